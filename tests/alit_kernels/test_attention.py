"""attention, varlen_attention, attention_map: against softmax written out, and against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from alit_kernels import attention, attention_map, varlen_attention
from alit_kernels._cpp import INSTRUCTION_SETS
from alit_kernels._library import extension
from alit_kernels.attention import configurations, issued_work
from alit_kernels.attention.__main__ import table as issued_work_table
from alit_kernels.attention.cases import LONG_CASES, TEST_CASES, Case, make
from alit_kernels.attention.problem import Problem
from alit_kernels.testing import assert_within_budget
from tests.helpers.targets import DEVICE, Target, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
everywhere = pytest.mark.parametrize("target", targets("cpp", "torch", "triton"))


def skip_what_the_interpreter_lacks(target: Target, dtype: torch.dtype) -> None:
    if target == Target("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 product")


def inputs(case: Case, target: Target, dtype: torch.dtype = torch.float32) -> Problem:
    return make(case, dtype=dtype, device=target.device)


def attend(x: Problem, target: Target, **options: Any) -> tuple[Tensor, Tensor]:
    return varlen_attention(
        *x[:4],
        key_offsets=x.key_offsets,
        key_mask=x.key_mask,
        max_length=x.max_length,
        max_key_length=x.max_key_length,
        return_lse=True,
        implementation=target.implementation,
        **options,
    )


def per_sequence(x: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Oracle: one sequence and head at a time, softmax spelled out."""
    q, k, v, offsets, *_, key_mask, _ = x
    _, key_offsets = x.ends
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for b in range(len(offsets) - 1):
        rows, keys = slice(*offsets[b : b + 2].tolist()), slice(*key_offsets[b : b + 2].tolist())
        for h in range(q.shape[1]):
            kept = slice(None) if key_mask is None else key_mask[keys]
            qh, kh, vh = (
                q[rows, h].to(dtype),
                k[keys, h].to(dtype)[kept],
                v[keys, h].to(dtype)[kept],
            )
            scores = qh @ kh.t() * q.shape[2] ** -0.5
            lse[h, rows] = scores.logsumexp(-1)
            if kh.shape[0]:
                out[rows, h] = scores.softmax(-1) @ vh
    return out, lse


def gradients(x: Problem, dtype: torch.dtype, run: Any) -> list[Tensor]:
    """Of a weighted sum of outputs and finite log-sum-exps, by q, k and v."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in x[:3]]
    out, lse = run(x._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    total = (out * weights).sum() + (finite * weights.sum(-1).t()).sum()
    # Without a single row the oracle touches no input.
    (total + sum(0.0 * leaf[:0].sum() for leaf in leaves)).backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check_forward(x: Problem, target: Target, dtype: torch.dtype) -> None:
    out, lse = attend(x, target)
    exact, exact_lse = per_sequence(x, torch.float64)
    eager, eager_lse = per_sequence(x, torch.float32)
    if target.implementation == "torch":  # its exponentials of half-precision scores have 20 bits
        eager_lse = per_sequence(x, dtype)[1]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_budget(out, eager.to(dtype), exact, what="out")
    assert_within_budget(lse, eager_lse, exact_lse, what="lse")


def check_gradients(x: Problem, target: Target, dtype: torch.dtype) -> None:
    ours = gradients(x, dtype, lambda y: attend(y, target))
    exact = gradients(x, torch.float64, lambda y: per_sequence(y, torch.float64))
    eager = gradients(x, dtype, lambda y: per_sequence(y, dtype))
    if not all(gradient.isfinite().all() for gradient in eager):  # float16 scores overflow in eager
        eager = gradients(x, torch.float32, lambda y: per_sequence(y, torch.float32))
    for name, a, e, x64 in zip("qkv", ours, eager, exact, strict=True):
        assert_within_budget(a, e, x64, k=3, what=f"gradient of {name}")
    assert not ours[0][x.offsets[-1] :].any()


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*TEST_CASES, *LONG_CASES))
def test_varlen_forward(case: Case, dtype: torch.dtype, target: Target) -> None:
    skip_what_the_interpreter_lacks(target, dtype)
    check_forward(inputs(case, target, dtype), target, dtype)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_varlen_gradients(case: Case, dtype: torch.dtype, target: Target) -> None:
    skip_what_the_interpreter_lacks(target, dtype)
    check_gradients(inputs(case, target, dtype), target, dtype)


@pytest.mark.parametrize("target", targets("cpp", "torch"))
@pytest.mark.parametrize("case", LONG_CASES)
def test_varlen_gradients_of_long_sequences(case: Case, target: Target) -> None:
    check_gradients(inputs(case, target), target, torch.float32)


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize("mask_all", (False, True))
@pytest.mark.parametrize("columns", (16, 64))
def test_every_kind_of_tile(
    columns: int, mask_all: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of other sizes than the table has; the last one masked after the loop, or all of them in it."""
    tile = configurations.Tile(32, columns, 4, 2, mask_all)
    for kernel in configurations.KERNELS:
        monkeypatch.setitem(configurations.TABLE, (kernel, 16, 2), (tile,) * 3)
    x = inputs(Case((16, 64, 65, 33, 63), 1, 16, spare=3), target, torch.float16)
    check_forward(x, target, torch.float16)
    check_gradients(x, target, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", TEST_CASES)
def test_every_instruction_set(
    case: Case, instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = extension()
    if core is None:
        pytest.skip("the compiled extension is not installed")
    best = core.build_info()["instruction_set"]
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine has no {instruction_set}")
    monkeypatch.setenv("ALIT_KERNELS_INSTRUCTION_SET", instruction_set)
    target = Target("cpp", "cpu")
    check_forward(inputs(case, target, dtype), target, dtype)
    check_gradients(inputs(case, target, dtype), target, dtype)


@everywhere
def test_a_thousand_sequences(target: Target) -> None:
    """The search for a tile's sequence goes over several blocks of offsets; most sequences are empty."""
    lengths = tuple(3 if b % 100 == 99 or b in (0, 255, 256, 257) else 0 for b in range(1000))
    x = inputs(Case(lengths, 1, 16, spare=1), target)
    check_forward(x, target, torch.float32)


@pytest.mark.parametrize("target", targets("cpp", "torch")[1:])
def test_a_thousand_sequences_of_tokens(target: Target) -> None:
    """Forward and backward, against the reference in float64."""
    x = inputs(Case(tuple(b * 7 % 6 for b in range(1000)), 2, 8, spare=1), target)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        def call(y: Problem) -> tuple[Tensor, Tensor]:
            return attend(y, Target(name, "cpu"))

        typed = x._replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))
        return [*call(typed), *gradients(x, dtype, call)]

    ours, eager = (run(name, torch.float32) for name in (target.implementation, "reference"))
    for a, e, exact in zip(ours, eager, run("reference", torch.float64), strict=True):
        assert_within_budget(a, e, exact)


@pytest.mark.parametrize("target", targets("cpp")[1:])
def test_threads_do_not_change_the_result(target: Target) -> None:
    """Bit for bit: many tasks, and too few, which are cut between blocks of queries."""
    for case in (Case((70, 3, 300, 0, 65), 3, 16, masked=True), Case((400,), 1, 16)):
        x = inputs(case, target)
        results = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            run = lambda y: attend(y, target)  # noqa: E731
            results.append([*run(x), *gradients(x, torch.float32, run)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@everywhere
def test_what_is_not_finite_stays_in_its_row(target: Target) -> None:
    """NaN in a query spoils its own row, NaN in a value the column of its sequence; nothing else changes."""
    x = inputs(Case((5, 20, 3), 1, 16), target)
    clean, clean_lse = attend(x, target)
    x.q[7], x.v[26, 0, 2] = torch.nan, torch.inf
    out, lse = attend(x, target)
    spoilt = torch.zeros_like(out, dtype=torch.bool)
    spoilt[7], spoilt[25:28, 0, 2] = True, True
    assert not out[spoilt].isfinite().any() and lse[0, 7].isnan()
    kept = torch.arange(28, device=target.device) != 7
    assert torch.equal(out[~spoilt], clean[~spoilt]) and torch.equal(
        lse[:, kept], clean_lse[:, kept]
    )


@everywhere
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_unaligned_inputs(dtype: torch.dtype, target: Target) -> None:
    """Memory that begins one element after an aligned address."""
    x = inputs(Case((5, 20), 2, 16), target, dtype)

    def shifted(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].view(t.shape).copy_(t)

    moved = x._replace(q=shifted(x.q), k=shifted(x.k), v=shifted(x.v))
    assert moved.q.data_ptr() % 16
    for a, b in zip(attend(moved, target), attend(x, target), strict=True):
        torch.testing.assert_close(a, b)


def dense(target: Target, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, device=target.device, requires_grad=True) for _ in range(3)]


@everywhere
@pytest.mark.parametrize("masked", (False, True))
def test_dense_equals_packed(masked: bool, target: Target) -> None:
    q, k, v = dense(target, 2, 17, 3, 16)
    key_mask = torch.rand(2, 17, device=target.device) > 0.4 if masked else None
    out, lse = attention(
        q, k, v, key_mask=key_mask, return_lse=True, implementation=target.implementation
    )
    packed, packed_lse = varlen_attention(
        *(t.flatten(0, 1) for t in (q, k, v)),
        torch.tensor([0, 17, 34], dtype=torch.int32, device=target.device),
        max_length=17,
        key_mask=None if key_mask is None else key_mask.flatten(),
        return_lse=True,
        implementation=target.implementation,
    )
    torch.testing.assert_close(out.flatten(0, 1), packed)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), packed_lse)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum() + lse[lse.isfinite()].sum(), (q, k, v))
    total = (packed * weights.flatten(0, 1)).sum() + packed_lse[packed_lse.isfinite()].sum()
    for a, b in zip(ours, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@everywhere
def test_dense_cross_attention(target: Target) -> None:
    q, k, v = (
        torch.randn(2, n, 2, 16, device=target.device, requires_grad=True) for n in (5, 9, 9)
    )
    out = attention(q, k, v, implementation=target.implementation)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@everywhere
def test_no_key_gives_zeros(target: Target) -> None:
    q, k, v = dense(target, 1, 3, 2, 4)
    mask = torch.zeros(1, 3, dtype=torch.bool, device=target.device)
    out, lse = attention(
        q, k, v, key_mask=mask, return_lse=True, implementation=target.implementation
    )
    assert not out.any() and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_offsets_that_begin_late(target: Target) -> None:
    """Wrong, but nobody looks at them on a GPU: nothing outside is read, and the sequences are as they should be."""
    triton_ = pytest.importorskip("alit_kernels.attention.triton_")
    rows = torch.full((350, 1, 16), torch.nan, device=target.device)
    q = rows[200:].normal_()
    memory = torch.tensor([-192, 100, 150], dtype=torch.int32, device=target.device)
    out, _ = triton_.attention(Problem(q, q, q, memory[1:], None, 50, 50, None, 0.25))
    assert out[64:100].isfinite().all()
    expected = attention(q[None, 100:], q[None, 100:], q[None, 100:])
    torch.testing.assert_close(out[None, 100:], expected)


@everywhere
def test_masked_keys_are_not_read(target: Target) -> None:
    q, k, v = (x.detach() for x in dense(target, 1, 4, 2, 8))
    keep = torch.tensor([[True, False, True, False]], device=target.device)
    k[~keep], v[~keep] = torch.nan, torch.inf
    k.requires_grad_()
    out = attention(q, k, v, key_mask=keep, implementation=target.implementation)
    torch.testing.assert_close(out, attention(q, k[:, keep[0]], v[:, keep[0]]))
    out.sum().backward()
    assert k.grad.isfinite().all() and not k.grad[~keep].any()


@everywhere
def test_strided_views(target: Target) -> None:
    """Of a fused projection, expanded, transposed: the same numbers, and results in the order of the rows given."""
    qkv = torch.randn(2, 6, 3, 2, 8, device=target.device)
    q, k, v = qkv.unbind(2)

    def run(*x: Tensor) -> Tensor:
        return attention(*x, implementation=target.implementation)

    expected = run(q.clone(), k.clone(), v.clone())
    assert expected.is_contiguous()
    torch.testing.assert_close(run(q, k, v), expected)
    one = k[:, :1].expand(-1, 6, -1, -1)
    torch.testing.assert_close(run(q, one, v), run(q, one.clone(), v))
    torch.testing.assert_close(run(q.mT.contiguous().mT, k, v), expected)
    sequence_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    out = run(*sequence_first.unbind(2))
    torch.testing.assert_close(out, expected)
    assert out.transpose(0, 1).is_contiguous(), "sequence-first in, sequence-first out"


@everywhere
@pytest.mark.parametrize("scale", (-0.7, 0.0, 2.0))
def test_any_scale(scale: float, target: Target) -> None:
    q, k, v = dense(target, 2, 7, 1, 16)
    weights = torch.randn_like(q)

    def run(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, scale=scale, return_lse=True, implementation=implementation)
        return [out, lse, *torch.autograd.grad((out * weights).sum() + lse.sum(), leaves)]

    ours, eager = (run(name, torch.float32) for name in (target.implementation, "reference"))
    exact = run("reference", torch.float64)
    for i, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(a.detach(), e.detach(), x.detach(), k=2 if i < 2 else 3)


def test_gradcheck() -> None:
    q, k, v = (torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, key_mask=mask, return_lse=True), (q, k, v)
    )
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    packed = [torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, offsets, max_length=3, return_lse=True), packed
    )


@everywhere
def test_permuting_sequences_permutes_outputs(target: Target) -> None:
    """Bit for bit, outputs and gradients; and a batch gives what each sequence alone gives."""
    lengths, order = (5, 70, 2, 33), (2, 0, 3, 1)
    x = inputs(Case(lengths, 2, 16), target)
    pieces = [t.split(lengths) for t in x[:3]]

    def run(chosen: tuple[int, ...]) -> list[dict[int, Tensor]]:
        rows = [torch.cat([piece[b] for b in chosen]).requires_grad_() for piece in pieces]
        sizes = [lengths[b] for b in chosen]
        offsets = torch.tensor([0, *sizes], device=target.device).cumsum(0).int()
        out = varlen_attention(*rows, offsets, max_length=70, implementation=target.implementation)
        out.square().sum().backward()
        results = (out.detach(), *(r.grad for r in rows))
        return [dict(zip(chosen, t.split(sizes), strict=True)) for t in results]

    straight, shuffled = run((0, 1, 2, 3)), run(order)
    alone = [run((b,)) for b in range(4)]
    exact = target.implementation != "reference"  # its padded products may differ in the last bit
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
    for t in range(4):
        for b in range(4):
            torch.testing.assert_close(shuffled[t][b], straight[t][b], **tolerance)
            torch.testing.assert_close(alone[b][t][b], straight[t][b], **tolerance)


@pytest.mark.parametrize("target", targets("triton"))
def test_attention_map(target: Target) -> None:
    x = inputs(Case((6, 0, 40), 3, 8, spare=2), target)
    lse = varlen_attention(*x[:4], max_length=41, return_lse=True)[1]
    result = attention_map(
        *(x.q, x.k, lse, x.offsets),
        queries=range(2, 38),
        keys=range(1, 36),
        max_length=41,
        implementation=target.implementation,
    )
    assert result.shape == (3, 36, 35)
    for b, (start, stop) in enumerate(((0, 6), (6, 6), (6, 46))):
        q, k = x.q[start:stop].transpose(0, 1), x.k[start:stop].transpose(0, 1)
        full = torch.zeros(41, 41, device=target.device)
        if stop > start:
            full[: stop - start, : stop - start] = (q @ k.mT * 8**-0.5).softmax(-1).mean(0)
        torch.testing.assert_close(result[b], full[2:38, 1:36])


def test_the_page_shows_the_issued_work() -> None:
    page = Path(__file__).parents[2] / "docs" / "attention.md"
    assert issued_work_table() in page.read_text(), "run python -m alit_kernels.attention"


def test_issued_work_counts_what_the_kernel_does() -> None:
    """The steps and programs of the kernels, counted one by one."""
    tile = configurations.Tile(64, 32, 4, 2)
    for length, issued in {0: 0, 1: 64, 64: 64, 65: 128, 129: 192}.items():
        assert tile.issued(length, 32) == 32 * issued
    for length, issued in {0: 0, 1: 32, 32: 32, 33: 64, 289: 320}.items():
        assert tile.issued(64, length) == 64 * issued
    assert issued_work(configurations.Tile(128, 128, 4, 2), 289) == Fraction(384**2, 289**2)


def test_limits_of_head_dimensions() -> None:
    """Wider heads than the kernels take: an explicit request raises and names the reason."""
    q = torch.randn(1, 3, 1, 136)
    if "triton" in [t.values[0].implementation for t in targets("triton") if not t.marks]:
        with pytest.raises(ValueError, match="head dimension 136 exceeds 128"):
            attention(q.to(DEVICE), q.to(DEVICE), q.to(DEVICE), implementation="triton")
    assert attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("target", targets("cpp", "torch", "triton")[1:])
def test_opcheck_of_every_implementation(target: Target) -> None:
    x = inputs(Case((3, 0, 5), 2, 16, spare=1), target)
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    torch.library.opcheck(
        torch.ops.alit_kernels.attention.default,
        (*leaves, x.offsets, None, 6, 6, None, 0.3, target.implementation),
    )
    q, k, v = dense(target, 2, 4, 2, 16)
    for order in (
        (1, 0, 2, 3),
        (1, 0, 3, 2),
    ):  # sequence-first, the second with another last dimension
        layout = q.detach().permute(order).contiguous().permute(order).requires_grad_()
        torch.library.opcheck(
            torch.ops.alit_kernels.attention.default,
            (layout, k, v, None, None, 4, 4, None, 0.3, target.implementation),
        )


def test_rows_too_far_apart_for_sequence_first_results() -> None:
    wide = torch.empty(3, 1 << 14, 16, 64, device="meta").transpose(0, 1)
    assert attention(wide, wide, wide).is_contiguous()
    assert attention(wide[1:], wide[1:], wide[1:]).transpose(0, 1).is_contiguous()


@everywhere
def test_compiles_without_graph_break(target: Target) -> None:
    """With changing offsets, and without compiling again for them."""
    counter = CompileCounterWithBackend("aot_eager")
    x = inputs(Case((3, 0, 5), 2, 16, spare=1), target)

    def run(q: Tensor, offsets: Tensor) -> Tensor:
        return varlen_attention(
            q, q, q, offsets, max_length=9, implementation=target.implementation
        )

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for ends in ((3, 8), (1, 9), (0, 2)):
        offsets = torch.tensor([0, *ends], dtype=torch.int32, device=target.device)
        leaf = x.q.nan_to_num().requires_grad_()
        (ours,) = torch.autograd.grad(compiled(leaf, offsets).square().sum(), leaf)
        (eager,) = torch.autograd.grad(run(leaf, offsets).square().sum(), leaf)
        torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


UNSPECIALIZED = """
from alit_kernels.attention import kernels
sizes = {"sequences", "length", "key_length", "lse_b", "lse_h", "mask_b"}
for kernel in (kernels.forward_kernel, kernels.backward_queries_kernel, kernels.backward_keys_kernel):
    found = {p.name for p in kernel.params if p.name in sizes}
    fixed = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
    assert found == sizes and not found & fixed, (kernel.__name__, found & fixed)
print("fine")
"""


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_kernels_do_not_depend_on_lengths(target: Target) -> None:
    """Nothing that follows from the lengths is a compile-time constant or specialised on divisibility."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", UNSPECIALIZED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graph_replays_with_new_lengths() -> None:
    target = Target("triton", "cuda")
    x = inputs(Case((40, 70, 10), 2, 64), target, torch.bfloat16)
    static = [t.clone().requires_grad_() for t in x[:3]]
    offsets = x.offsets.clone()

    def step() -> tuple[Tensor, ...]:
        out = varlen_attention(*static, offsets, max_length=120, implementation="triton")
        return (out, *torch.autograd.grad(out.float().square().sum(), static))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for ends in ((0, 40, 110, 120), (0, 0, 100, 119), (0, 1, 2, 3)):
        offsets.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        captured = [r.clone() for r in results]
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_autocast_changes_the_inputs_and_nothing_inside() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3))
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention(q, k.bfloat16(), v, return_lse=True)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)
    actual[0].sum().backward()
    assert q.grad.dtype == torch.float32


def test_no_key_takes_no_gradient_from_its_log_sum_exp() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    first = attention(q, k, v, key_mask=torch.zeros(1, 3) > 0, return_lse=True)[1]
    second = attention(q, k, v, key_mask=torch.zeros(1, 3) > 0, return_lse=True)[1]
    torch.logaddexp(first, second).sum().backward()
    assert not q.grad.isnan().any()


def test_heads_without_width() -> None:
    out = attention(*[torch.empty(1, 3, 2, 0)] * 3)
    assert out.shape == (1, 3, 2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(5, 2, 4)}, ValueError, "k: expected shape"),
        ({"v": torch.randn(6, 2, 4).half()}, TypeError, "v: expected dtype"),
        ({"q": torch.zeros(6, 2, 4, dtype=torch.int64)}, TypeError, "q: expected dtype"),
        ({"q": [1]}, TypeError, "q: expected a tensor"),
        ({"offsets": torch.tensor([0, 3, 6])}, TypeError, "offsets: expected dtype int32"),
        (
            {"offsets": torch.tensor([0, 4, 3], dtype=torch.int32)},
            ValueError,
            "offsets: expected an ascending",
        ),
        (
            {"offsets": torch.tensor([0, 4, 9], dtype=torch.int32)},
            ValueError,
            "offsets: expected at most 6 rows",
        ),
        ({"max_length": 2}, ValueError, "max_length: expected at least 3"),
        ({"max_length": 2.0}, TypeError, "max_length: expected an int"),
        ({"max_length": 2**31}, ValueError, r"max_length: expected less than 2\^31"),
        (
            {"max_key_length": 2},
            ValueError,
            "max_key_length: expected at least 3, the longest of offsets",
        ),
        ({"key_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        (
            {"implementation": "fast"},
            ValueError,
            "implementation='fast' of alit_kernels.attention",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    q, k, v = (torch.randn(6, 2, 4) for _ in range(3))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "offsets": torch.tensor([0, 3, 6], dtype=torch.int32),
        "max_length": 3,
    }
    with pytest.raises(error, match=message):
        varlen_attention(**{**arguments, **change})


def test_wrong_map_ranges() -> None:
    x = make(Case((3,), 1, 4))
    lse = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="queries: expected a range"):
        attention_map(*x[:2], lse, x.offsets, queries=range(0, 9), keys=range(2), max_length=3)
    with pytest.raises(TypeError, match="keys: expected a range"):
        attention_map(*x[:2], lse, x.offsets, queries=range(2), keys=[0], max_length=3)
