"""Plain PyTorch definitions of the attention ops; scores are kept, softmax is written out.

Accumulation in float32 (float64 for float64 inputs). ``lse`` is the natural log of the sum of exponentials of a query's
scores, -inf where it has no key; its output and gradients are then zero. Keys that are masked are never read, nor are
packed rows from ``offsets[-1]`` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..ragged.reference import pack, unpack
from .layout import empty_rows


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    max_length: int,
    max_key_length: int,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if offsets is None:
        return _dense(q, k, v, key_mask, scale)
    padded = _Padded(offsets, key_offsets, max_length, max_key_length)
    mask = padded.key_mask(key_mask, k)
    out, lse = _dense(padded.queries(q), padded.keys(k), padded.keys(v), mask, scale)
    return pack(out, offsets, q.shape[0]), padded.packed_sums(lse, q.shape[0])


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    max_length: int,
    max_key_length: int,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if offsets is None:
        return _dense_backward(grad_out, grad_lse, q, k, v, out, lse, key_mask, scale)
    padded = _Padded(offsets, key_offsets, max_length, max_key_length)
    grads = _dense_backward(
        padded.queries(grad_out),
        padded.sums(grad_lse),
        padded.queries(q),
        padded.keys(k),
        padded.keys(v),
        padded.queries(out),
        padded.sums(lse),
        padded.key_mask(key_mask, k),
        scale,
    )
    ends = (padded.offsets, padded.key_offsets, padded.key_offsets)
    rows = (q.shape[0], k.shape[0], k.shape[0])
    grad_q, grad_k, grad_v = map(pack, grads, ends, rows)
    return grad_q, grad_k, grad_v


class _Padded:
    """Packed rows as dense batches: the definition on them is that of dense batches, padding masked."""

    def __init__(
        self, offsets: Tensor, key_offsets: Tensor | None, max_length: int, max_key_length: int
    ) -> None:
        self.offsets, self.max_length = offsets, max_length
        self.key_offsets = offsets if key_offsets is None else key_offsets
        self.max_key_length = max_key_length

    def queries(self, rows: Tensor) -> Tensor:
        return unpack(rows, self.offsets, self.max_length, 0.0)

    def keys(self, rows: Tensor) -> Tensor:
        return unpack(rows, self.key_offsets, self.max_key_length, 0.0)

    def sums(self, sums: Tensor) -> Tensor:
        """(H, T) to (B, H, N)."""
        return self.queries(sums.t()).transpose(1, 2)

    def packed_sums(self, sums: Tensor, rows: int) -> Tensor:
        return pack(sums.transpose(1, 2), self.offsets, rows).t().contiguous()

    def key_mask(self, key_mask: Tensor | None, k: Tensor) -> Tensor:
        """False for padding too."""
        return self.keys(k.new_ones(k.shape[0], dtype=torch.bool) if key_mask is None else key_mask)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q)
    keys, values = _without_masked(k.to(dtype), key_mask), _without_masked(v.to(dtype), key_mask)
    scores = _scores(q.to(dtype), keys, key_mask, scale)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", _probabilities(scores, lse), values)
    return empty_rows(q).copy_(out), lse


def _dense_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(scores - lse) and dS = P (dO V^T - rowsum(dO O) + dlse):
    dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q.
    """
    dtype = accumulation_dtype(q)
    query, grad = q.to(dtype), grad_out.to(dtype)
    keys, values = _without_masked(k.to(dtype), key_mask), _without_masked(v.to(dtype), key_mask)
    probabilities = _probabilities(_scores(query, keys, key_mask, scale), lse)
    grad_v = torch.einsum("bhqk,bqhd->bkhd", probabilities, grad)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    delta = (grad * out.to(dtype)).sum(-1).transpose(1, 2)
    grad_lse = torch.where(
        lse == -torch.inf, 0.0, grad_lse
    )  # no key, no gradient, whatever comes in
    grad_scores = probabilities * (grad_probabilities - (delta - grad_lse)[..., None])
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, keys) * scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, query) * scale
    return (
        empty_rows(q).copy_(grad_q),
        empty_rows(k).copy_(_without_masked(grad_k, key_mask)),
        empty_rows(k).copy_(_without_masked(grad_v, key_mask)),
    )


def attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    offsets: Tensor,
    query_start: int,
    query_stop: int,
    key_start: int,
    key_stop: int,
    max_length: int,
    scale: float,
) -> Tensor:
    dtype, padded = accumulation_dtype(q), _Padded(offsets, None, max_length, max_length)
    queries, keys = slice(query_start, query_stop), slice(key_start, key_stop)
    query, key = padded.queries(q)[:, queries].to(dtype), padded.keys(k)[:, keys].to(dtype)
    used = padded.key_mask(None, k)
    scores = _scores(query, key, used[:, keys], scale)
    probabilities = _probabilities(scores, padded.sums(lse)[..., queries])
    return torch.where(used[:, queries, None], probabilities.mean(1), 0.0)


def _scores(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return (
        scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    )


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()


def _without_masked(rows: Tensor, key_mask: Tensor | None) -> Tensor:
    return rows if key_mask is None else rows.masked_fill(~key_mask[:, :, None, None], 0.0)
