"""Plain PyTorch definitions of the attention ops; scores are kept, softmax is written out.

Accumulation in float32 (float64 for float64 inputs). ``lse`` is the natural log of the sum of exponentials of a query's
scores, -inf where it has no key; its output and gradients are then zero. Keys that are masked are never read, nor are
packed rows from ``offsets[-1]`` on. Packed sequences are padded: theirs is the result of that dense batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..ragged.reference import pack_by_offsets, unpack
from .layout import empty_rows, laid_out
from .problem import Problem


def attention(x: Problem) -> tuple[Tensor, Tensor]:
    if x.offsets is not None:
        out, lse = attention(_padded(x))
        packed_lse = pack_by_offsets(lse.transpose(1, 2), x.offsets, x.q.shape[0])
        packed = pack_by_offsets(out, x.offsets, x.q.shape[0])
        return packed, packed_lse.t().contiguous()
    query, keys, values = _operands(x)
    scores = _scores(query, keys, x.scale, x.key_mask, x.key_stop)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", _probabilities(scores, lse), values)
    return empty_rows(x.q).copy_(out), lse


def attention_backward(
    x: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys_wanted: bool,
) -> tuple[Tensor, ...]:
    return laid_out(x, _gradients(x, grad_out, grad_lse, out, lse), keys_wanted)


def _gradients(
    x: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With P = exp(scores - lse) and dS = P (dO V^T - rowsum(dO O) + dlse):
    dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q.
    """
    if x.offsets is not None:
        grads = _gradients(
            _padded(x),
            unpack(grad_out, x.offsets, x.max_length, 0.0),
            None if grad_lse is None else _padded_sums(grad_lse, x.offsets, x.max_length),
            unpack(out, x.offsets, x.max_length, 0.0),
            _padded_sums(lse, x.offsets, x.max_length),
        )
        ends, key_ends = x.ends
        rows, key_rows = x.q.shape[0], x.k.shape[0]
        grad_q, grad_k, grad_v = map(
            pack_by_offsets, grads, (ends, key_ends, key_ends), (rows, key_rows, key_rows)
        )
        return grad_q, grad_k, grad_v
    query, keys, values = _operands(x)
    grad = grad_out.to(query.dtype)
    probabilities = _probabilities(_scores(query, keys, x.scale, x.key_mask, x.key_stop), lse)
    grad_v = torch.einsum("bhqk,bqhd->bkhd", probabilities, grad)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad, values)
    delta = (grad * out.to(query.dtype)).sum(-1).transpose(1, 2)
    if grad_lse is not None:  # no key, no gradient, whatever comes in
        delta = delta - torch.where(lse == -torch.inf, 0.0, grad_lse)
    grad_scores = probabilities * (grad_probabilities - delta[..., None])
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, keys) * x.scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, query) * x.scale
    return (
        grad_q,
        _without_masked(grad_k, x.key_mask),
        _without_masked(grad_v, x.key_mask),
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
    dtype, every = accumulation_dtype(q), q.new_ones(q.shape[0], dtype=torch.bool)
    query, key, used = (unpack(each, offsets, max_length, 0.0) for each in (q, k, every))
    queries, keys = slice(query_start, query_stop), slice(key_start, key_stop)
    scores = _scores(query[:, queries].to(dtype), key[:, keys].to(dtype), scale, used[:, keys])
    sums = _padded_sums(lse, offsets, max_length)[..., queries]
    return torch.where(used[:, queries, None], _probabilities(scores, sums).mean(1), 0.0)


def _padded(x: Problem) -> Problem:
    """Packed rows as a dense batch, padding masked."""
    ends, key_ends = x.ends
    key_mask = x.k.new_ones(x.k.shape[0], dtype=torch.bool) if x.key_mask is None else x.key_mask
    return x._replace(
        q=unpack(x.q, ends, x.max_length, 0.0),
        k=unpack(x.k, key_ends, x.max_key_length, 0.0),
        v=unpack(x.v, key_ends, x.max_key_length, 0.0),
        key_mask=unpack(key_mask, key_ends, x.max_key_length, 0.0),
        key_stop=None if x.key_stop is None else unpack(x.key_stop, ends, x.max_length, 0.0),
        offsets=None,
        key_offsets=None,
    )


def _padded_sums(sums: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Pad numbers of packed rows, (H, T), to (B, H, N)."""
    return unpack(sums.t(), offsets, max_length, 0.0).transpose(1, 2)


def _operands(x: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the dtype of sums, 0 where keys are masked."""
    dtype = accumulation_dtype(x.q)
    keys, values = (_without_masked(each.to(dtype), x.key_mask) for each in (x.k, x.v))
    return x.q.to(dtype), keys, values


def _scores(
    q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None, key_stop: Tensor | None = None
) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if key_stop is not None:
        unseen = torch.arange(k.shape[1], device=k.device) >= key_stop[..., None]
        scores = scores.masked_fill(unseen if unseen.ndim == 2 else unseen[:, None], -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()


def _without_masked(rows: Tensor, key_mask: Tensor | None) -> Tensor:
    return rows if key_mask is None else rows.masked_fill(~key_mask[:, :, None, None], 0.0)
