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
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q)
    keys, values = _without_masked(k.to(dtype), key_mask), _without_masked(v.to(dtype), key_mask)
    scores = _scores(q.to(dtype), keys, key_mask, scale)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", _probabilities(scores, lse), values)
    return empty_rows(q).copy_(out), lse


def attention_backward(
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


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    max_length: int,
    max_key_length: int,
    key_mask: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    key_offsets = offsets if key_offsets is None else key_offsets
    mask = _padded_key_mask(key_mask, key_offsets, max_key_length, k.shape[0])
    out, lse = attention(
        unpack(q, offsets, max_length, 0.0),
        unpack(k, key_offsets, max_key_length, 0.0),
        unpack(v, key_offsets, max_key_length, 0.0),
        mask,
        scale,
    )
    return pack(out, offsets, q.shape[0]), pack(
        lse.transpose(1, 2), offsets, q.shape[0]
    ).t().contiguous()


def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    max_length: int,
    max_key_length: int,
    key_mask: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    key_offsets = offsets if key_offsets is None else key_offsets
    grad_q, grad_k, grad_v = attention_backward(
        unpack(grad_out, offsets, max_length, 0.0),
        unpack(grad_lse.t(), offsets, max_length, 0.0).transpose(1, 2),
        unpack(q, offsets, max_length, 0.0),
        unpack(k, key_offsets, max_key_length, 0.0),
        unpack(v, key_offsets, max_key_length, 0.0),
        unpack(out, offsets, max_length, 0.0),
        unpack(lse.t(), offsets, max_length, 0.0).transpose(1, 2),
        _padded_key_mask(key_mask, key_offsets, max_key_length, k.shape[0]),
        scale,
    )
    rows, key_rows = q.shape[0], k.shape[0]
    return (
        pack(grad_q, offsets, rows),
        pack(grad_k, key_offsets, key_rows),
        pack(grad_v, key_offsets, key_rows),
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
    dtype = accumulation_dtype(q)
    queries, keys = slice(query_start, query_stop), slice(key_start, key_stop)
    query = unpack(q, offsets, max_length, 0.0)[:, queries].to(dtype)
    key = unpack(k, offsets, max_length, 0.0)[:, keys].to(dtype)
    used = torch.arange(max_length, device=q.device) < offsets.diff()[:, None]
    scores = _scores(query, key, used[:, keys], scale)
    probabilities = _probabilities(
        scores, unpack(lse.t(), offsets, max_length, 0.0)[:, queries].transpose(1, 2)
    )
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


def _padded_key_mask(
    key_mask: Tensor | None, key_offsets: Tensor, max_key_length: int, rows: int
) -> Tensor:
    if key_mask is None:
        key_mask = torch.ones(rows, dtype=torch.bool, device=key_offsets.device)
    return unpack(key_mask, key_offsets, max_key_length, 0.0)
