"""cumulative_offsets, pack, unpack, compact, append, tail_mask: against loops over sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alit_kernels import append, compact, cumulative_offsets, pack, tail_mask, unpack
from alit_kernels.ragged.cases import TEST_CASES, Case, Inputs, make

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pieces(x: Inputs) -> list[Tensor]:
    return [row[:length] for row, length in zip(x.padded, x.lengths.tolist(), strict=True)]


def packed_of(sequences: list[Tensor], capacity: int, like: Tensor) -> Tensor:
    out = like.new_zeros((capacity, *like.shape[2:]))
    if sequences:
        rows = torch.cat(sequences)
        out[: len(rows)] = rows
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_pack_and_unpack(case: Case, dtype: torch.dtype) -> None:
    x = make(case, dtype=dtype)
    packed, offsets = pack(x.padded, x.lengths, capacity=x.capacity)
    assert offsets.tolist() == [sum(case.lengths[:i]) for i in range(len(case.lengths) + 1)]
    assert offsets.dtype == torch.int32
    assert torch.equal(packed, packed_of(pieces(x), x.capacity, x.padded))
    packed[int(offsets[-1]) :] = torch.nan
    back = unpack(packed, offsets, max_length=x.max_length, fill=-7.0)
    assert torch.equal(back, torch.where(x.padded.isnan(), -7.0, x.padded))


def test_integers_and_trailing_dimensions() -> None:
    ids = torch.arange(12).view(2, 6)
    packed, offsets = pack(ids, torch.tensor([2, 5]), capacity=8)
    assert packed.tolist() == [0, 1, 6, 7, 8, 9, 10, 0] and packed.dtype == torch.int64
    assert unpack(packed, offsets, max_length=5, fill=-1)[0].tolist() == [0, 1, -1, -1, -1]
    heads = torch.randn(2, 3, 4, 5)
    packed, offsets = pack(heads, torch.tensor([3, 1]), capacity=4)
    assert torch.equal(packed, torch.cat([heads[0], heads[1, :1]]))
    assert torch.equal(
        pack(heads.transpose(2, 3), torch.tensor([3, 1]), capacity=4)[0], packed.transpose(1, 2)
    )


@pytest.mark.parametrize("case", TEST_CASES)
def test_compact(case: Case) -> None:
    x = make(case)
    packed, offsets = pack(x.padded, x.lengths, capacity=x.capacity)
    packed[int(offsets[-1]) :] = torch.nan
    keep = torch.rand(x.capacity) > 0.4
    out, new_offsets, source = compact(packed, offsets, keep, capacity=x.capacity + 2)
    kept = [row for row in range(int(offsets[-1])) if keep[row]]
    assert source.tolist() == kept + [-1] * (x.capacity + 2 - len(kept))
    assert torch.equal(out[: len(kept)], packed[kept]) and not out[len(kept) :].any()
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    assert new_offsets.diff().tolist() == [int(keep[a:b].sum()) for a, b in bounds]


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("case", TEST_CASES)
def test_append(case: Case, shared: bool) -> None:
    x = make(case)
    packed, offsets = pack(x.padded, x.lengths, capacity=x.capacity)
    packed[int(offsets[-1]) :] = torch.nan
    count = len(case.lengths)
    rows = torch.randn(2, case.width) if shared else torch.randn(count, 2, case.width)
    select = torch.rand(count) > 0.5
    capacity = x.capacity + 2 * count
    out, new_offsets = append(packed, offsets, rows, select=select, capacity=capacity)
    grown = [
        torch.cat([piece, rows if shared else rows[b]]) if select[b] else piece
        for b, piece in enumerate(pieces(x))
    ]
    assert torch.equal(out, packed_of(grown, capacity, x.padded))
    assert new_offsets.diff().tolist() == [len(piece) for piece in grown]
    everyone, _ = append(packed, offsets, rows, capacity=capacity)
    assert torch.equal(
        everyone,
        append(packed, offsets, rows, select=torch.ones_like(select), capacity=capacity)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_mask(dtype: torch.dtype) -> None:
    tokens, fill = torch.randn(4, 5, 3).to(dtype), torch.randn(3).to(dtype)
    lengths = torch.tensor([0, 2, 5, 9])
    tokens[0], tokens[1, 2:] = torch.nan, torch.inf
    out = tail_mask(tokens, lengths, fill)
    assert torch.equal(out[0], fill.expand(5, 3)) and torch.equal(out[2:], tokens[2:])
    assert torch.equal(out[1], torch.cat([tokens[1, :2], fill.expand(3, 3)]))


def test_gradchecks() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    lengths = torch.tensor([2, 0, 3])
    offsets = cumulative_offsets(lengths)
    keep = torch.tensor([True, False, True, True, False, True])
    select = torch.tensor([True, True, False])
    check = torch.autograd.gradcheck
    assert check(lambda x: pack(x, lengths, capacity=7)[0], leaf(3, 4, 2))
    assert check(lambda x: unpack(x, offsets, max_length=4, fill=1.0), leaf(6, 2))
    assert check(lambda x: compact(x, offsets, keep, capacity=5)[0], leaf(6, 2))
    assert check(
        lambda x, r: append(x, offsets, r, select=select, capacity=10)[0], (leaf(6, 2), leaf(2, 2))
    )
    assert check(
        lambda x, r: append(x, offsets, r, select=select, capacity=10)[0],
        (leaf(6, 2), leaf(3, 2, 2)),
    )
    assert check(lambda x, f: tail_mask(x, lengths, f), (leaf(3, 4, 2), leaf(2)))


def test_values_no_check_can_see() -> None:
    """Where values are not checked (CUDA), a capacity too small drops rows and reads nothing out of bounds."""
    from alit_kernels.ragged import reference

    padded, offsets = torch.randn(2, 3, 1), torch.tensor([0, 3, 6], dtype=torch.int32)
    assert torch.equal(reference.pack(padded, offsets, 4)[:, 0], padded.flatten()[:4])
    packed = reference.pack(padded, offsets, 4)
    assert torch.equal(
        reference.unpack(packed, offsets, 3, 0.0)[1, :, 0], torch.cat([packed[3], torch.zeros(2)])
    )
    out, _, source = reference.compact(
        packed, torch.tensor([0, 4], dtype=torch.int32), torch.ones(4) > 0, 2
    )
    assert source.tolist() == [0, 1] and torch.equal(out, packed[:2])
    far, select = torch.tensor([0, 3, 99], dtype=torch.int32), torch.ones(2) > 0
    reference.compact(packed, far, torch.ones(4) > 0, 2)
    grown, grown_offsets = reference.append(packed, far, torch.ones(2, 1), select, 5)
    assert grown.shape == (5, 1) and grown.isfinite().all()
    reference.append_backward(grown, far, grown_offsets, select, 4, 2, True)


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
