"""Dense batches, views, memory that begins anywhere, and compiled code: the same numbers in the order of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from alit_kernels import attention, varlen_attention
from alit_kernels.attention.cases import Case, make
from tests.helpers.attention import attend, dense, everywhere
from tests.helpers.targets import Target, targets


@everywhere
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_unaligned_inputs(dtype: torch.dtype, target: Target) -> None:
    """Memory that begins one element after an aligned address."""
    x = make(Case((5, 20), 2, 16), dtype=dtype, device=target.device)

    def shifted(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].view(t.shape).copy_(t)

    moved = x._replace(q=shifted(x.q), k=shifted(x.k), v=shifted(x.v))
    assert moved.q.data_ptr() % 16
    for a, b in zip(attend(moved, target), attend(x, target), strict=True):
        torch.testing.assert_close(a, b)


@everywhere
@pytest.mark.parametrize(("keys", "masked"), [(17, False), (17, True), (9, False), (9, True)])
def test_dense_equals_packed(keys: int, masked: bool, target: Target) -> None:
    q, k, v = (torch.randn(2, rows, 3, 16, device=target.device) for rows in (17, keys, keys))
    key_mask = torch.rand(2, keys, device=target.device) > 0.4 if masked else None
    if key_mask is not None:
        k[~key_mask], v[~key_mask] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(
        *leaves, key_mask=key_mask, return_lse=True, implementation=target.implementation
    )
    offsets = torch.arange(3, dtype=torch.int32, device=target.device)
    packed, packed_lse = varlen_attention(
        *(x.flatten(0, 1) for x in leaves),
        offsets * 17,
        key_offsets=offsets * keys,
        max_length=17,
        max_key_length=keys,
        key_mask=None if key_mask is None else key_mask.flatten(),
        return_lse=True,
        implementation=target.implementation,
    )
    torch.testing.assert_close(out.flatten(0, 1), packed)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), packed_lse)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum() + lse[lse.isfinite()].sum(), leaves)
    total = (packed * weights.flatten(0, 1)).sum() + packed_lse[packed_lse.isfinite()].sum()
    for a, b in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b)


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


def test_rows_too_far_apart_for_sequence_first_results() -> None:
    wide = torch.empty(3, 1 << 14, 16, 64, device="meta").transpose(0, 1)
    assert attention(wide, wide, wide).is_contiguous()
    assert attention(wide[1:], wide[1:], wide[1:]).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("target", targets("cpp", "torch", "triton")[1:])
def test_opcheck_of_every_implementation(target: Target) -> None:
    x = make(Case((3, 0, 5), 2, 16, spare=1), device=target.device)
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    torch.library.opcheck(
        torch.ops.alit_kernels.attention.default,
        (*leaves, x.offsets, None, 6, 6, None, None, 0.3, target.implementation),
    )
    q, k, v = dense(target, 2, 4, 2, 16)
    for order in (
        (1, 0, 2, 3),
        (1, 0, 3, 2),
    ):  # sequence-first, the second with another last dimension
        layout = q.detach().permute(order).contiguous().permute(order).requires_grad_()
        torch.library.opcheck(
            torch.ops.alit_kernels.attention.default,
            (layout, k, v, None, None, 4, 4, None, None, 0.3, target.implementation),
        )


@everywhere
def test_compiles_without_graph_break(target: Target) -> None:
    """With changing offsets, and without compiling again for them."""
    counter = CompileCounterWithBackend("aot_eager")
    x = make(Case((3, 0, 5), 2, 16, spare=1), device=target.device)

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graph_replays_with_new_lengths() -> None:
    x = make(Case((40, 70, 10), 2, 64), dtype=torch.bfloat16, device="cuda")
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
