"""attention, varlen_attention, attention_map: against softmax written out, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alit_kernels import attention, attention_map, varlen_attention
from alit_kernels.attention.cases import TEST_CASES, Case, make
from alit_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_varlen_forward(case: Case, dtype: torch.dtype) -> None:
    x = make(case, dtype=dtype)
    out, lse = varlen_attention(
        *x[:4],
        key_offsets=x.key_offsets,
        key_mask=x.key_mask,
        max_length=x.max_length,
        max_key_length=x.max_key_length,
        return_lse=True,
    )
    exact, exact_lse = per_sequence(x, torch.float64)
    eager, eager_lse = per_sequence(x, torch.float32)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_budget(out, eager.to(dtype), exact, what="out")
    assert_within_budget(lse, eager_lse, exact_lse, what="lse")


@pytest.mark.parametrize("case", TEST_CASES)
def test_varlen_gradients(case: Case) -> None:
    x = make(case)
    used = x.offsets[-1]

    def gradients(dtype: torch.dtype, run: object) -> list[Tensor]:
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x.q, x.k, x.v)]
        out, lse = run(x._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
        finite = torch.where(lse.isfinite(), lse, 0.0)
        total = (out * weights).sum() + (finite * weights.sum(-1).t()).sum()
        # Without a single row the oracle touches no input.
        (total + sum(0.0 * leaf[:0].sum() for leaf in leaves)).backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]

    ours = gradients(
        torch.float32,
        lambda y: varlen_attention(
            *y[:4],
            key_offsets=y.key_offsets,
            key_mask=y.key_mask,
            max_length=y.max_length,
            max_key_length=y.max_key_length,
            return_lse=True,
        ),
    )
    exact = gradients(torch.float64, lambda y: per_sequence(y, torch.float64))
    eager = gradients(torch.float32, lambda y: per_sequence(y, torch.float32))
    for name, a, e, x64 in zip("qkv", ours, eager, exact, strict=True):
        assert_within_budget(a, e, x64, k=3, what=f"gradient of {name}")
    assert not ours[0][used:].any()


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
