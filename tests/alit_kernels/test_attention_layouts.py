"""Layouts of attention's inputs: dense batches, views, unaligned memory, compiled code give the same results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import alit_kernels
from alit_kernels import attention, varlen_attention
from alit_kernels.attention.cases import Case, make
from alit_kernels.attention.op import self_attention
from alit_kernels.testing import assert_within_budget
from tests.helpers.attention import attend, dense, everywhere
from tests.helpers.targets import Target, targets


@everywhere
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_unaligned_inputs(dtype: torch.dtype, target: Target) -> None:
    """Memory that begins one element after an aligned address gives the same results."""
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
@pytest.mark.parametrize("layout", ("dense", "sequence first", "packed", "empty", "gaps"))
def test_queries_keys_and_values_as_one_tensor(layout: str, target: Target) -> None:
    """One tensor of queries, keys and values gives the results of three, and one gradient in its layout."""
    lengths = [4, 0, 1, 3] if layout == "packed" else [0, 0]
    shape = (2, 5) if layout in ("dense", "sequence first", "gaps") else (sum(lengths) + 2,)
    qkv = torch.randn(*shape, 3, 2, 16, device=target.device)
    if layout == "sequence first":
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        qkv = qkv.repeat_interleave(2, -1)[..., ::2]
    options: dict[str, Any] = {"implementation": target.implementation}
    if qkv.ndim == 4:
        ends = torch.tensor([0, *lengths], device=target.device).cumsum(0).int()
        options |= {"offsets": ends, "max_length": max(lengths)}
        qkv[sum(lengths) :] = torch.nan
    attend = attention if qkv.ndim == 5 else varlen_attention
    leaves = [x.clone().requires_grad_() for x in qkv.unbind(-3)]
    expected = attend(*leaves, **options)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, weights)
    fused = qkv.detach().requires_grad_()
    for _ in range(2):  # new signature, then a known one
        out = self_attention(fused, **options)
        (gradient,) = torch.autograd.grad(out, fused, weights)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradient, torch.stack(gradients, -3))
        for x in (out, gradient):
            assert (x.transpose(0, 1) if layout == "sequence first" else x).is_contiguous()
    assert torch.equal(self_attention(qkv.detach(), **options), out)


def test_one_tensor_under_autocast_and_wrong_ones() -> None:
    qkv = torch.randn(2, 5, 3, 1, 4, requires_grad=True)
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self_attention(qkv)
        assert out.dtype == torch.bfloat16
        assert torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32
    for wrong, error, message in (
        ((qkv[:, :, :2],), ValueError, "qkv: expected shape"),
        ((qkv[0],), ValueError, "qkv: expected 5 dimensions"),
        ((qkv, ends), ValueError, "qkv: expected 4 dimensions"),
        ((qkv.int(),), TypeError, "qkv: expected dtype"),
        (([qkv],), TypeError, "qkv: expected a tensor"),
        ((qkv[0], ends.long()), TypeError, "offsets: expected dtype"),
        ((qkv[0], ends + 9), ValueError, "offsets: "),
        ((qkv[0], ends.to("meta")), ValueError, "offsets: expected device"),
    ):
        with pytest.raises(error, match=message):
            self_attention(*wrong, max_length=5)
    with pytest.raises(TypeError, match="max_length: expected an int"):
        self_attention(qkv[0], ends, max_length=None)  # type: ignore[arg-type]


@everywhere
@pytest.mark.parametrize("scale", (None, -0.5))
def test_gradients_of_some_inputs_are_those_of_all(scale: float | None, target: Target) -> None:
    inputs = [torch.randn(2, rows, 2, 16, device=target.device) for rows in (20, 7, 7)]
    weights = torch.randn_like(inputs[0])

    def gradients(wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = attention(*leaves, scale=scale, implementation=target.implementation)
        return torch.autograd.grad(out, [leaves[i] for i in wanted], weights)

    every = gradients((0, 1, 2))
    for wanted in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        for i, found in zip(wanted, gradients(wanted), strict=True):
            assert torch.equal(found, every[i]), (wanted, i)


@everywhere
def test_gradient_of_the_log_sum_exp_alone(target: Target) -> None:
    x = make(Case((9, 0, 17), 2, 16, masked=True, spare=3), device=target.device)

    def gradients(implementation: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in x[:3]]
        y = x._replace(q=leaves[0], k=leaves[1], v=leaves[2])
        lse = varlen_attention(**y._asdict(), return_lse=True, implementation=implementation)[1]
        return torch.autograd.grad(lse[lse.isfinite()].sum(), leaves)

    ours, eager = (gradients(name, torch.float32) for name in (target.implementation, "reference"))
    exact = gradients("reference", torch.float64)
    for name, a, e, x64 in zip("qkv", ours, eager, exact, strict=True):
        assert_within_budget(a, e, x64, k=3, what=f"gradient of {name}")


@everywhere
def test_strided_views(target: Target) -> None:
    """Views of a fused projection, expanded and transposed tensors give the same results, in the queries' layout."""
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
    """Attention compiles without graph breaks, and changing offsets do not recompile it."""
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


@pytest.mark.parametrize("heads, shared", ((4, 2), (6, 1), (3, 3)))
def test_the_recipe_for_shared_keys(heads: int, shared: int) -> None:
    """The recipe for shared keys in docs/attention.md, dense and packed, equals torch's ``enable_gqa``."""
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    (code,) = re.findall(r"```python\n(def shared_key_attention.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {"alit_kernels": alit_kernels}
    exec(code, found)
    recipe = found["shared_key_attention"]
    q = torch.randn(2, 9, heads, 8, requires_grad=True)
    k, v = (torch.randn(2, 7, shared, 8, requires_grad=True) for _ in range(2))
    kept = torch.arange(7) < torch.tensor([[7], [5]])
    stops = torch.randint(0, 9, (2, 9), dtype=torch.int32)
    until = torch.arange(7) < stops[..., None]
    for options, mask in (
        ({}, None),
        ({"key_mask": kept}, kept[:, None, None]),
        ({"key_stop": stops[0]}, until[0]),
        ({"key_mask": kept, "key_stop": stops}, kept[:, None, None] & until[:, None]),
    ):
        ours = recipe(q, k, v, **options)
        theirs = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), mask, enable_gqa=True
        ).transpose(1, 2)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        grads = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    group, offsets = heads // shared, torch.tensor([0, 5, 7], dtype=torch.int32)
    rows, (keys, held) = q[0, :7], (x[0] for x in (k, v))
    packed = varlen_attention(
        rows.unflatten(1, (shared, group)).transpose(1, 2).flatten(0, 1), keys, held, offsets * group,
        key_offsets=offsets, max_length=5 * group, max_key_length=5,
        key_stop=stops[0, :7].repeat_interleave(group),
    ).unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)  # fmt: skip
    for a, b in ((0, 5), (5, 7)):
        alone = recipe(q[:1, a:b], k[:1, a:b], v[:1, a:b], key_stop=stops[0, a:b])
        torch.testing.assert_close(packed[a:b], alone[0])


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
