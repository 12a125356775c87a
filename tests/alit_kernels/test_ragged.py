"""cumulative_offsets, pack, unpack, compact, append, tail_mask: against loops over sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import alit_kernels
from alit_kernels import append, compact, cumulative_offsets, pack, tail_mask, unpack
from alit_kernels._library import extension, ops
from alit_kernels.ragged import reference
from alit_kernels.ragged.cases import TEST_CASES, Case, Inputs, make
from alit_kernels.testing import assert_within_budget
from tests.helpers.emulation import COMPILER, NO_COMPILER, emulated_cuda
from tests.helpers.targets import Target, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("cumulative_offsets", "pack", "unpack", "compact", "append", "tail_mask")
needs_core = pytest.mark.skipif(extension() is None, reason="the compiled core is not installed")
every_case = pytest.mark.parametrize("case", TEST_CASES, ids=str)


EMULATED = pytest.param(
    Target("cuda", "cpu"),
    id="cuda-emulated",
    marks=pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER),
)


@pytest.fixture(params=[*targets("cpp", "cuda"), EMULATED])
def ak(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The public functions in one implementation, and the device they run on."""
    target: Target = request.param
    functions = {
        name: partial(getattr(alit_kernels, name), implementation=target.implementation)
        for name in NAMES
    }
    with emulated_cuda() if target == ("cuda", "cpu") else nullcontext():
        yield SimpleNamespace(**functions, **target._asdict())


def pieces(x: Inputs) -> list[Tensor]:
    return [row[:length] for row, length in zip(x.padded, x.lengths.tolist(), strict=True)]


def packed_of(sequences: list[Tensor], capacity: int, like: Tensor) -> Tensor:
    out = like.new_zeros((capacity, *like.shape[2:]))
    if sequences:
        rows = torch.cat(sequences)
        out[: len(rows)] = rows
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_pack_and_unpack(ak: SimpleNamespace, case: Case, dtype: torch.dtype) -> None:
    x = make(case, dtype=dtype, device=ak.device)
    packed, offsets = ak.pack(x.padded, x.lengths, capacity=x.capacity)
    assert offsets.tolist() == [sum(case.lengths[:i]) for i in range(len(case.lengths) + 1)]
    assert offsets.dtype == torch.int32
    assert torch.equal(packed, packed_of(pieces(x), x.capacity, x.padded))
    for again in ak.pack(x.padded, x.lengths.int(), capacity=x.capacity):
        assert torch.equal(again, packed if again.dtype == dtype else offsets)
    packed[int(offsets[-1]) :] = torch.nan
    for fill in (0.0, -7.0):
        back = ak.unpack(packed, offsets, max_length=x.max_length, fill=fill)
        assert torch.equal(back, torch.where(x.padded.isnan(), fill, x.padded))


def test_integers_and_trailing_dimensions(ak: SimpleNamespace) -> None:
    ids = torch.arange(12, device=ak.device).view(2, 6)
    packed, offsets = ak.pack(ids, torch.tensor([2, 5], device=ak.device), capacity=8)
    assert packed.tolist() == [0, 1, 6, 7, 8, 9, 10, 0] and packed.dtype == torch.int64
    assert ak.unpack(packed, offsets, max_length=5, fill=-1)[0].tolist() == [0, 1, -1, -1, -1]
    heads = torch.randn(2, 3, 4, 5, device=ak.device)
    lengths = torch.tensor([3, 1], device=ak.device)
    packed, offsets = ak.pack(heads, lengths, capacity=4)
    assert torch.equal(packed, torch.cat([heads[0], heads[1, :1]]))
    transposed, _ = ak.pack(heads.transpose(2, 3), lengths, capacity=4)
    assert torch.equal(transposed, packed.transpose(1, 2))


@every_case
def test_compact(ak: SimpleNamespace, case: Case) -> None:
    x = make(case, device=ak.device)
    packed, offsets = ak.pack(x.padded, x.lengths, capacity=x.capacity)
    packed[int(offsets[-1]) :] = torch.nan
    keep = (torch.rand(x.capacity) > 0.4).to(ak.device)
    out, new_offsets, source = ak.compact(packed, offsets, keep, capacity=x.capacity + 2)
    kept = [row for row in range(int(offsets[-1])) if keep[row]]
    assert source.tolist() == kept + [-1] * (x.capacity + 2 - len(kept))
    assert torch.equal(out[: len(kept)], packed[kept]) and not out[len(kept) :].any()
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    assert new_offsets.diff().tolist() == [int(keep[a:b].sum()) for a, b in bounds]


@pytest.mark.parametrize("first", (0, 1, 16))
def test_compact_of_many_rows(ak: SimpleNamespace, first: int) -> None:
    """compact is right for more rows than a block of the CUDA kernel, unaligned masks, and ends at block borders."""
    rows, capacity = 4 * 4096 - 5, 7000
    packed = torch.randn(rows, 1)
    offsets = torch.tensor([0, 0, 4096, 4096, 8191, 12300, rows - 3], dtype=torch.int32)
    keep = torch.rand(rows + first) > 0.6
    keep[4000:4200] = True
    chosen = keep.to(ak.device)[first:]
    assert chosen.data_ptr() % 16 == first % 16
    eager = partial(alit_kernels.compact, capacity=capacity, implementation="reference")
    expected = eager(packed, offsets, keep[first:])
    found = ak.compact(packed.to(ak.device), offsets.to(ak.device), chosen, capacity=capacity)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("shared", (True, False))
@every_case
def test_append(ak: SimpleNamespace, case: Case, shared: bool) -> None:
    x = make(case, device=ak.device)
    packed, offsets = ak.pack(x.padded, x.lengths, capacity=x.capacity)
    packed[int(offsets[-1]) :] = torch.nan
    count = len(case.lengths)
    rows = torch.randn(2, case.width) if shared else torch.randn(count, 2, case.width)
    rows, select = rows.to(ak.device), (torch.rand(count) > 0.5).to(ak.device)
    capacity = x.capacity + 2 * count
    out, new_offsets = ak.append(packed, offsets, rows, select=select, capacity=capacity)
    grown = [
        torch.cat([piece, rows if shared else rows[b]]) if select[b] else piece
        for b, piece in enumerate(pieces(x))
    ]
    assert torch.equal(out, packed_of(grown, capacity, x.padded))
    assert new_offsets.diff().tolist() == [len(piece) for piece in grown]
    everyone, _ = ak.append(packed, offsets, rows, capacity=capacity)
    chosen, _ = ak.append(packed, offsets, rows, select=torch.ones_like(select), capacity=capacity)
    assert torch.equal(everyone, chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_mask(ak: SimpleNamespace, dtype: torch.dtype) -> None:
    tokens, fill = (torch.randn(*shape).to(ak.device, dtype) for shape in ((5, 5, 3), (3,)))
    lengths = torch.tensor([0, 2, 5, 9, -1], device=ak.device)
    tokens[0], tokens[1, 2:] = torch.nan, torch.inf
    out = ak.tail_mask(tokens, lengths, fill)
    assert torch.equal(out[0], fill.expand(5, 3)) and torch.equal(out[2:4], tokens[2:4])
    assert torch.equal(out[1], torch.cat([tokens[1, :2], fill.expand(3, 3)]))
    assert torch.equal(out[4], fill.expand(5, 3))
    assert torch.equal(ak.tail_mask(tokens, lengths.int(), fill)[1:], out[1:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_gradients_of_tail_mask(ak: SimpleNamespace, dtype: torch.dtype) -> None:
    """Gradients are right for rows read 16 bytes at a time, for other rows, and for partial blocks."""
    lengths = torch.tensor([0, 70, 131, 7], device=ak.device)
    kept = (torch.arange(131, device=ak.device) < lengths[:, None])[..., None]
    for width in (24, 13):
        leaves = [
            torch.zeros(shape, dtype=dtype, device=ak.device, requires_grad=True)
            for shape in ((4, 131, width), (width,))
        ]
        grad = torch.randint(-8, 8, (4, 131, 24), device=ak.device).to(dtype)
        for given in (grad[..., :width], grad[:1, :1, :width].expand(4, 131, width)):
            found = torch.autograd.grad(ak.tail_mask(leaves[0], lengths, leaves[1]), leaves, given)
            assert torch.equal(found[0], torch.where(kept, given, 0.0))
            assert torch.equal(
                found[1], torch.where(kept, 0.0, given).float().sum((0, 1)).to(dtype)
            )


def test_strided_inputs(ak: SimpleNamespace) -> None:
    """Strided, expanded and transposed inputs give what their contiguous copies give."""
    device = ak.device
    lengths = torch.tensor([3, 0, 2], device=device)
    storage = torch.randn(6, 8, 10, device=device)
    views = (
        storage[::2, 1:5],
        storage[:1, :4].expand(3, 4, 10),
        storage[:3, :1].expand(3, 4, 10),
        storage[:3, :4, :1].expand(3, 4, 10),
        storage[:3, :4, ::2],
        storage.transpose(0, 2)[:3, :4, :5],
        storage.transpose(0, 1)[:3, :4, :5],
    )
    for view in views:
        packed, _ = ak.pack(view, lengths, capacity=7)
        assert torch.equal(packed, ak.pack(view.contiguous(), lengths, capacity=7)[0])
        assert torch.equal(
            ak.tail_mask(view, lengths, view[0, 0]),
            ak.tail_mask(view.contiguous(), lengths, view[0, 0].contiguous()),
        )
        rows = view[0]
        few = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
        keep = torch.tensor([True, False, True, True], device=device)
        for function in (
            lambda rows, few=few: ak.unpack(rows, few, max_length=3),
            lambda rows, few=few, keep=keep: ak.compact(rows, few, keep, capacity=4)[0],
            lambda rows, few=few: ak.append(rows, few, rows, capacity=16)[0],
            lambda rows, few=few, fresh=view: ak.append(rows, few, fresh, capacity=16)[0],
        ):
            assert torch.equal(function(rows), function(rows.contiguous()))


def differentiated(
    call: Callable[..., Tensor], *leaves: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Result and gradients of ``call`` computed in ``dtype``, with the same incoming gradient for all dtypes."""
    own = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = call(*own)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(leaves[0].dtype)
    out.backward(grad.to(out.device, dtype))
    return [out.detach(), *(x.grad for x in own)]


Calls = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def differentiable_calls(longest: int, device: str, dtype: torch.dtype) -> Calls:
    """Name -> (call, leaves) of every differentiable op; "append" with shared rows and with each sequence's own."""
    lengths = torch.tensor([2, 0, longest, 3], device=device)
    offsets, rows = cumulative_offsets(lengths), longest + 10
    generator = torch.Generator().manual_seed(3)
    keep = (torch.rand(rows, generator=generator) > 0.5).to(device)
    select = torch.tensor([True, True, False, True], device=device)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def grown(f: Callable[..., Any], x: Tensor, r: Tensor) -> Tensor:
        return f(x, offsets, r, select=select, capacity=rows + 10)[0]

    return {
        "pack": (lambda f, x: f(x, lengths, capacity=rows)[0], (leaf(4, longest + 3, 6),)),
        "unpack": (lambda f, x: f(x, offsets, max_length=longest + 1, fill=1.0), (leaf(rows, 6),)),
        "compact": (lambda f, x: f(x, offsets, keep, capacity=rows - 2)[0], (leaf(rows, 6),)),
        "append": (grown, (leaf(rows, 6), leaf(3, 6))),
        "append ": (grown, (leaf(rows, 6), leaf(4, 3, 6))),
        "tail_mask": (lambda f, x, m: f(x, lengths, m), (leaf(4, longest + 70, 6), leaf(6))),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(ak: SimpleNamespace, dtype: torch.dtype) -> None:
    for name, (call, leaves) in differentiable_calls(130, ak.device, dtype).items():
        eager = partial(getattr(alit_kernels, name.strip()), implementation="reference")
        ours = differentiated(partial(call, getattr(ak, name.strip())), *leaves, dtype=dtype)
        theirs = differentiated(partial(call, eager), *leaves, dtype=dtype)
        exact = differentiated(partial(call, eager), *leaves, dtype=torch.float64)
        assert torch.equal(ours[0], theirs[0]), name
        for a, e, x in zip(ours[1:], theirs[1:], exact[1:], strict=True):
            assert a.dtype == dtype
            assert_within_budget(a, e, x, k=3, what=f"gradient of {name}")


def test_gradients_that_nobody_asked_for(ak: SimpleNamespace) -> None:
    """A wanted gradient does not depend on whether others are wanted."""
    for name, (call, leaves) in differentiable_calls(70, ak.device, torch.float32).items():
        function, grads = getattr(ak, name.strip()), []
        for wanted in (leaves, *([x] for x in leaves)):
            own = [x.detach().requires_grad_(any(x is y for y in wanted)) for x in leaves]
            out = call(function, *own)
            weights = torch.linspace(-1, 1, out.numel(), device=ak.device).view(out.shape)
            out.backward(weights)
            grads.append([x.grad for x in own])
        for i, together in enumerate(grads[0]):
            alone = grads[1 + i]
            assert torch.equal(alone[i], together), name
            assert all(x is None for j, x in enumerate(alone) if j != i), name


def test_gradchecks() -> None:
    for name, (call, leaves) in differentiable_calls(3, "cpu", torch.float64).items():
        function = partial(call, getattr(alit_kernels, name.strip()))
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves]), name


@needs_core
def test_results_do_not_depend_on_the_thread_count() -> None:
    grad, lengths = torch.randn(5, 700, 33), torch.tensor([600, 0, 7, 700, 64])
    offsets = cumulative_offsets(torch.tensor([300, 1, 0, 700, 40]))
    select = torch.tensor([True, False, True, True, True])
    packed = torch.randn(int(offsets[-1]) + 4 * 50, 33)
    grown = offsets + 50 * torch.tensor([0, 1, 1, 2, 3, 4], dtype=torch.int32)
    arguments = {
        "tail_mask_backward": (grad, lengths, True, True),
        "append_backward": (
            *(packed, offsets, grown, select, int(offsets[-1]) + 3, 50),
            *(True, True, True),
        ),
        "unpack": (packed, offsets, 700, 0.5),
    }
    for name, values in arguments.items():
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = ops()[name](*values, implementation="cpp")
            results.append(out if isinstance(out, tuple) else (out,))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), name


@needs_core
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_large_outputs(dtype: torch.dtype) -> None:
    """Outputs of more than 16 MB are written past the caches; odd widths put rows anywhere in a line."""
    width = 2501 if dtype == torch.float32 else 5001
    lengths = torch.tensor([700, 0, 650, 1, 699])
    padded = torch.randn(5, 700, width, dtype=dtype)
    rows, offsets = int(lengths.sum()), cumulative_offsets(lengths)
    packed, _ = pack(padded, lengths, capacity=rows, implementation="reference")
    keep = torch.arange(rows) % 7 != 3
    fresh = torch.randn(5, 3, width, dtype=dtype)
    calls: dict[str, Callable[[str], Any]] = {
        "pack": lambda how: pack(padded, lengths, capacity=rows + 2, implementation=how),
        "strided": lambda how: pack(padded[..., 1:], lengths, capacity=rows, implementation=how),
        "unpack": lambda how: unpack(packed, offsets, max_length=701, implementation=how),
        "compact": lambda how: compact(packed, offsets, keep, capacity=rows, implementation=how),
        "append": lambda how: append(
            packed, offsets, fresh, capacity=rows + 17, implementation=how
        ),
        "tail_mask": lambda how: tail_mask(padded, lengths, fresh[0, 0], implementation=how),
    }
    for name, call in calls.items():
        found, expected = call("cpp"), call("reference")
        found, expected = ((x,) if isinstance(x, Tensor) else x for x in (found, expected))
        assert found[0].nbytes > 1 << 24, name
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


@needs_core
def test_compiled_core_refuses_to_leave_its_arrays() -> None:
    """The compiled core raises on indices out of bounds in backward ops, whose arguments are not checked before."""
    rows, select = torch.randn(4, 2), torch.ones(2, dtype=torch.bool)
    fine, rest = torch.tensor([0, 1, 2], dtype=torch.int32), (4, 1, True, True, True)
    for target_row in ([0, 1, 4, 2], [0, -2, 1, 2]):
        with pytest.raises(ValueError, match="target_row: expected -1 or a row"):
            ops()["compact_backward"](
                rows, torch.tensor(target_row, dtype=torch.int32), implementation="cpp"
            )
    for offsets, grown, message in (
        ([0, 9, 9], [0, 1, 2], "offsets: expected at most"),
        ([0, 2, 1], [0, 1, 2], "offsets: expected an ascending"),
        ([0, 1, 2], [0, 2, 9], "offsets: expected at most"),
        ([0, 1, 2], [0, 1, 4], "new_offsets: expected the offsets of"),
    ):
        before, after = (torch.tensor(x, dtype=torch.int32) for x in (offsets, grown))
        with pytest.raises(ValueError, match=message):
            ops()["append_backward"](rows, before, after, select, *rest, implementation="cpp")
    ops()["append_backward"](rows, fine, 2 * fine, select, *rest, implementation="cpp")


def test_values_no_check_can_see() -> None:
    """If values are not checked (CUDA), a capacity too small drops rows and nothing is read out of bounds."""
    padded, offsets = torch.randn(2, 3, 1), torch.tensor([0, 3, 6], dtype=torch.int32)
    packed, same = reference.pack(padded, torch.tensor([3, 3]), 4)
    assert torch.equal(packed[:, 0], padded.flatten()[:4]) and torch.equal(same, offsets)
    assert torch.equal(
        reference.unpack(packed, offsets, 3, 0.0)[1, :, 0], torch.cat([packed[3], torch.zeros(2)])
    )
    out, _, source, target = reference.compact(
        packed, torch.tensor([0, 4], dtype=torch.int32), torch.ones(4) > 0, 2
    )
    assert source.tolist() == [0, 1] and torch.equal(out, packed[:2])
    assert target.tolist() == [0, 1, -1, -1]
    far, select = torch.tensor([0, 3, 99], dtype=torch.int32), torch.ones(2) > 0
    reference.compact(packed, far, torch.ones(4) > 0, 2)
    grown, grown_offsets = reference.append(packed, far, torch.ones(2, 1), select, 5)
    assert grown.shape == (5, 1) and grown.isfinite().all()
    reference.append_backward(grown, far, grown_offsets, select, 4, 2, True, True, True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, o: pack(x, torch.tensor([3, -1]), capacity=6),
            ValueError,
            "lengths: expected at least 0, got -1",
        ),
        (
            lambda x, o: pack(x, torch.tensor([4, 0]), capacity=6),
            ValueError,
            "lengths: expected at most N = 3, got 4",
        ),
        (
            lambda x, o: pack(x, torch.tensor([3, 2]), capacity=4),
            ValueError,
            "capacity: expected at least 5 rows",
        ),
        (
            lambda x, o: pack(x, torch.tensor([3, 2]), capacity=-1),
            ValueError,
            "capacity: expected at least 0",
        ),
        (
            lambda x, o: pack(x, torch.tensor([3.0, 2.0]), capacity=5),
            TypeError,
            "lengths: expected dtype int32 or",
        ),
        (
            lambda x, o: pack(x, torch.tensor([3]), capacity=5),
            ValueError,
            "lengths: expected shape",
        ),
        (
            lambda x, o: cumulative_offsets(torch.tensor([2**31])),
            ValueError,
            r"lengths: expected a sum below 2\^31",
        ),
        (lambda x, o: unpack(x[0], o, max_length=1), ValueError, "max_length: expected at least 2"),
        (
            lambda x, o: unpack(x[0], o, max_length=3, fill=2**53 + 1),
            ValueError,
            "fill: expected a number that a float64 holds",
        ),
        (
            lambda x, o: cumulative_offsets(torch.tensor([2**62] * 4)),
            ValueError,
            r"lengths: expected a sum below 2\^31, got 18446744073709551616",
        ),
        (
            lambda x, o: unpack(x[0], o[1:], max_length=3),
            ValueError,
            "offsets: expected an ascending",
        ),
        (
            lambda x, o: unpack(x[0, :2], o, max_length=3),
            ValueError,
            "offsets: expected at most 2 rows",
        ),
        (
            lambda x, o: unpack(x[0], o[:0], max_length=3),
            ValueError,
            "offsets: expected at least one",
        ),
        (
            lambda x, o: compact(x[0], o, torch.ones(2) > 0, capacity=3),
            ValueError,
            "keep: expected shape",
        ),
        (
            lambda x, o: compact(x[0], o, torch.ones(3) > 0, capacity=2),
            ValueError,
            "capacity: expected at least 3",
        ),
        (
            lambda x, o: append(x[0], o, x[0], capacity=8),
            ValueError,
            "capacity: expected at least 9",
        ),
        (lambda x, o: append(x[0], o, x[0, :, :1], capacity=9), ValueError, "rows: expected shape"),
        (lambda x, o: append(x[0], o, x[0].half(), capacity=9), TypeError, "rows: expected dtype"),
        (
            lambda x, o: tail_mask(x, torch.tensor([1, 1]), x[0, 0, :1]),
            ValueError,
            "fill: expected shape",
        ),
    ],
)
def test_wrong_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4), torch.tensor([0, 2, 3], dtype=torch.int32))


def test_lengths_of_32_bits() -> None:
    assert cumulative_offsets(torch.tensor([3, 0, 2], dtype=torch.int32)).tolist() == [0, 3, 3, 5]
    with pytest.raises(ValueError, match=r"lengths: expected a sum below 2\^31, got 2147483648"):
        cumulative_offsets(torch.tensor([2**30, 2**30], dtype=torch.int32))


@pytest.mark.parametrize(
    ("dtype", "shared"),
    ((torch.complex64, False), (torch.complex64, True), (torch.float8_e4m3fn, False)),
)
def test_gradients_of_other_types(dtype: torch.dtype, shared: bool) -> None:
    """Gradients of complex and float8 rows are moved; shared rows are summed, except float8, which torch cannot sum."""
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    packed, rows = torch.ones(3, 2), torch.ones(*(() if shared else (2,)), 1, 2)
    leaves = [x.to(dtype).requires_grad_() for x in (packed, rows)]
    out, _ = append(leaves[0], offsets, leaves[1], capacity=5)
    found = torch.autograd.grad(out, leaves, torch.full((5, 2), 3.0).to(dtype))
    for gradient, leaf, value in zip(found, leaves, (3.0, 6.0 if shared else 3.0), strict=True):
        assert gradient.shape == leaf.shape and (gradient.to(torch.complex64) == value).all()
