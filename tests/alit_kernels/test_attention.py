"""attention, varlen_attention, attention_map: against softmax written out, and against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from .targets import DEVICE, Target, targets
from torch import Tensor

from alit_kernels import attention, attention_map, varlen_attention
from alit_kernels._library import ops
from alit_kernels.attention import configurations, issued_work
from alit_kernels.attention.cases import LONG_CASES, TEST_CASES, Case, Inputs, make
from alit_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
everywhere = pytest.mark.parametrize("target", targets("torch", "triton"))


def skip_what_the_interpreter_lacks(target: Target, dtype: torch.dtype) -> None:
    if target == Target("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 product")


def inputs(case: Case, target: Target, dtype: torch.dtype = torch.float32) -> Inputs:
    return make(case, dtype=dtype, device=target.device)


def attend(x: Inputs, target: Target, **options: Any) -> tuple[Tensor, Tensor]:
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


def per_sequence(x: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Oracle: one sequence and head at a time, softmax spelled out."""
    q, k, v, offsets, key_offsets, key_mask, *_ = x
    key_offsets = offsets if key_offsets is None else key_offsets
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[1], q.shape[0], dtype=dtype)
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


def gradients(x: Inputs, dtype: torch.dtype, run: Any) -> list[Tensor]:
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


def check_forward(x: Inputs, target: Target, dtype: torch.dtype) -> None:
    out, lse = attend(x, target)
    exact, exact_lse = per_sequence(x, torch.float64)
    eager, eager_lse = per_sequence(x, torch.float32)
    if target.implementation == "torch":  # its exponentials of half-precision scores have 20 bits
        eager_lse = per_sequence(x, dtype)[1]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_budget(out, eager.to(dtype), exact, what="out")
    assert_within_budget(lse, eager_lse, exact_lse, what="lse")


def check_gradients(x: Inputs, target: Target, dtype: torch.dtype) -> None:
    ours = gradients(x, dtype, lambda y: attend(y, target))
    exact = gradients(x, torch.float64, lambda y: per_sequence(y, torch.float64))
    eager = gradients(x, dtype, lambda y: per_sequence(y, dtype))
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


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize("name", configurations.VARIANTS[1:])
@pytest.mark.parametrize("head_dim", (16, 128))
def test_variants(name: str, head_dim: int, target: Target) -> None:
    """Every kind of tail: 16, 32, 32 + 16, a whole step; folded rows with each."""
    case = Case((16, 64 + 16, 64 + 1, 33, 64 + 48, 64 + 49, 63), 1, head_dim, spare=3)
    x = inputs(case, target, torch.float16)
    with configurations.variant(name):
        check_forward(x, target, torch.float16)
        if head_dim == 16:
            check_gradients(x, target, torch.float16)


@everywhere
def test_a_thousand_sequences(target: Target) -> None:
    """The search for a tile's sequence goes over several blocks of offsets; most sequences are empty."""
    lengths = tuple(3 if b % 100 == 99 or b in (0, 255, 256, 257) else 0 for b in range(1000))
    x = inputs(Case(lengths, 1, 16, spare=1), target)
    check_forward(x, target, torch.float32)


@pytest.mark.parametrize("masked", (False, True))
def test_dense_equals_packed(masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 16).unbind(0)
    key_mask = torch.rand(2, 5) > 0.4 if masked else None
    out, lse = attention(q, k, v, key_mask=key_mask, return_lse=True)
    packed, packed_lse = varlen_attention(
        *(t.flatten(0, 1) for t in (q, k, v)),
        torch.tensor([0, 5, 10], dtype=torch.int32),
        max_length=5,
        key_mask=None if key_mask is None else key_mask.flatten(),
        return_lse=True,
    )
    torch.testing.assert_close(out.flatten(0, 1), packed)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), packed_lse)


def test_no_key_gives_zeros() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    out, lse = attention(q, k, v, key_mask=torch.zeros(1, 3, dtype=torch.bool), return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


def test_masked_keys_are_not_read() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    keep = torch.tensor([[True, False, True, False]])
    k[~keep], v[~keep] = torch.nan, torch.inf
    k.requires_grad_()
    out = attention(q, k, v, key_mask=keep)
    torch.testing.assert_close(out, attention(q, k[:, keep[0]], v[:, keep[0]]))
    out.sum().backward()
    assert k.grad.isfinite().all() and not k.grad[~keep].any()


def test_strided_views() -> None:
    qkv = torch.randn(2, 6, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    expanded = k[:, :1].expand(-1, 6, -1, -1)
    torch.testing.assert_close(attention(q, k, v), attention(q.clone(), k.clone(), v.clone()))
    torch.testing.assert_close(attention(q, expanded, v), attention(q, expanded.clone(), v))
    torch.testing.assert_close(
        attention(q.mT.contiguous().mT, k, v),
        attention(q, k, v),
        msg="last dimension not contiguous",
    )


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


def test_permuting_sequences_permutes_outputs() -> None:
    x = make(Case((5, 9, 2), 2, 8))
    out = varlen_attention(*x[:4], max_length=9)
    pieces = [t.split((5, 9, 2)) for t in (x.q, x.k, x.v)]
    shuffled = [torch.cat([piece[2], piece[0], piece[1]]) for piece in pieces]
    offsets = torch.tensor([0, 2, 7, 16], dtype=torch.int32)
    a, b, c = out.split((5, 9, 2))
    torch.testing.assert_close(
        varlen_attention(*shuffled, offsets, max_length=9), torch.cat([c, a, b])
    )


def test_attention_map() -> None:
    x = make(Case((6, 0, 4), 3, 8, spare=2))
    _, lse = varlen_attention(*x[:4], max_length=7, return_lse=True)
    result = attention_map(
        x.q, x.k, lse, x.offsets, queries=range(2, 6), keys=range(1, 5), max_length=7
    )
    assert result.shape == (3, 4, 4)
    for b, (start, stop) in enumerate(((0, 6), (6, 6), (6, 10))):
        q, k = x.q[start:stop].transpose(0, 1), x.k[start:stop].transpose(0, 1)
        full = torch.zeros(7, 7)
        if stop > start:
            full[: stop - start, : stop - start] = (q @ k.mT * 8**-0.5).softmax(-1).mean(0)
        torch.testing.assert_close(result[b], full[2:6, 1:5])


def test_autocast_changes_the_inputs_and_nothing_inside() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention(q, k, v, return_lse=True)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


def test_no_key_takes_no_gradient_from_its_log_sum_exp() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    first = attention(q, k, v, key_mask=torch.zeros(1, 3) > 0, return_lse=True)[1]
    second = attention(q, k, v, key_mask=torch.zeros(1, 3) > 0, return_lse=True)[1]
    torch.logaddexp(first, second).sum().backward()
    assert not q.grad.isnan().any()


def test_autocast() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32


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
        ({"key_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        (
            {"implementation": "fast"},
            ValueError,
            "implementation='fast' of alit_kernels.varlen_attention",
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
