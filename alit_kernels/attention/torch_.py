"""CPU implementation without padding: torch's fused CPU attention, called on each run of sequences of equal length.

The fused kernel is parallel over sequences, heads and blocks of queries and keeps no scores. Keys that are masked are
dropped before the call, so they cost nothing and are not read.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .layout import empty_rows, laid_out, sequence_first, unit_stride
from .problem import Problem

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(x: Problem) -> tuple[Tensor, Tensor]:
    if x.offsets is None:
        out, lse = attention(_packed(x))
        batch, length, heads, _ = x.q.shape
        return _in_order_of(x.q, out), lse.view(heads, batch, length).transpose(0, 1).contiguous()
    x, _ = _without_masked_keys(x)
    q, k, v = unit_stride(x.q, x.k, x.v)
    out, lse = q.new_zeros(q.shape), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
    lse[:, : int(x.ends[0][-1])] = -torch.inf
    for queries, keys in _runs(x):
        result, sums = _fused(queries(q), keys(k), keys(v), scale=x.scale)
        queries(out).copy_(result)
        queries(lse.t()[..., None]).copy_(sums[..., None])
    return out, lse


def attention_backward(
    x: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys_wanted: bool,
) -> tuple[Tensor, ...]:
    if x.offsets is None:
        packed = _gradients(
            _packed(x),
            grad_out.flatten(0, 1),
            None if grad_lse is None else grad_lse.transpose(0, 1).flatten(1),
            out.flatten(0, 1),
            lse.transpose(0, 1).flatten(1),
        )
        likes = (x.q, x.k, x.v)
        dense = (grad.view(like.shape) for grad, like in zip(packed, likes, strict=True))
        return laid_out(x, dense, keys_wanted)
    return laid_out(x, _gradients(x, grad_out, grad_lse, out, lse), keys_wanted)


def _gradients(
    x: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. That of the log-sum-exp, unknown to the fused backward, enters as a second backward:
    with dS += P dlse, dQ += scale dlse (P K) and dK += scale P^T (dlse Q), the value gradient for values K and
    output gradient dlse Q.
    """
    key_rows = x.k.shape[0]
    x, kept = _without_masked_keys(x)
    grad_q, grad_k, grad_v = (each.new_zeros(each.shape) for each in (x.q, x.k, x.v))
    grad_out, q, k, v, out = unit_stride(grad_out, x.q, x.k, x.v, out)
    for queries, keys in _runs(x):
        query, key, value = queries(q), keys(k), keys(v)
        sums = queries(lse.t()[..., None])[..., 0]
        result = _fused_backward(
            queries(grad_out), query, key, value, queries(out), sums, 0.0, False, scale=x.scale
        )
        targets = queries(grad_q), keys(grad_k), keys(grad_v)
        for target, gradient in zip(targets, result, strict=True):
            target.copy_(gradient)
        if grad_lse is not None:
            grad_sums = queries(grad_lse.t()[..., None])
            weighted = (grad_sums * query * x.scale).to(q.dtype)
            mean_key, _ = _fused(query, key, key, scale=x.scale)
            _, _, to_key = _fused_backward(
                weighted, query, key, key, mean_key, sums, 0.0, False, scale=x.scale
            )
            targets[0].add_((grad_sums * mean_key * x.scale).to(q.dtype))
            targets[1].add_(to_key)
    if kept is not None:
        grad_k, grad_v = (
            each.new_zeros((key_rows, *each.shape[1:])).index_copy_(0, kept, each)
            for each in (grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v


def _packed(x: Problem) -> Problem:
    """A dense batch as packed sequences of equal length."""
    batch, length = x.q.shape[:2]
    sequences = torch.arange(batch + 1)
    return x._replace(
        q=x.q.flatten(0, 1),
        k=x.k.flatten(0, 1),
        v=x.v.flatten(0, 1),
        offsets=sequences * length,
        key_offsets=sequences * x.k.shape[1],
        key_mask=None if x.key_mask is None else x.key_mask.flatten(),
    )


def _in_order_of(dense: Tensor, packed: Tensor) -> Tensor:
    result = packed.view(dense.shape)
    return empty_rows(dense).copy_(result) if sequence_first(dense) else result


def _without_masked_keys(x: Problem) -> tuple[Problem, Tensor | None]:
    """The packed problem of the keys that take part, and their rows among all keys; None for these without a mask."""
    if x.key_mask is None:
        return x, None
    _, key_ends = x.ends
    used = x.key_mask[: int(key_ends[-1])]
    counts = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    kept = used.nonzero()[:, 0]
    return x._replace(k=x.k[kept], v=x.v[kept], key_offsets=counts[key_ends.long()]), kept


def _runs(x: Problem) -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Two functions for each run of sequences of equal length with something to compute: they take packed queries, and
    packed keys, to the run's dense (count, heads, length, D) batch.
    """
    start = key_start = 0
    lengths = zip(*(ends.diff().tolist() for ends in x.ends), strict=True)
    for (length, keys), members in itertools.groupby(lengths):
        count = len(list(members))
        if length and keys:
            yield (
                functools.partial(_batch, start=start, count=count, length=length),
                functools.partial(_batch, start=key_start, count=count, length=keys),
            )
        start, key_start = start + count * length, key_start + count * keys


def _batch(packed: Tensor, *, start: int, count: int, length: int) -> Tensor:
    rows = packed[start : start + count * length]
    return rows.unflatten(0, (count, length)).transpose(1, 2)
