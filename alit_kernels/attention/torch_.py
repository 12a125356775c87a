"""CPU implementation without padding: torch's fused CPU attention, called on each run of sequences of equal length.

The fused kernel is parallel over sequences, heads and blocks of queries and keeps no scores. Keys that are masked are
dropped before the call, so they cost nothing and are not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import empty_rows, sequence_first, unit_stride

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    if offsets is not None:
        return _forward(q, k, v, offsets, key_offsets, key_mask, scale)
    batch, length, heads, _ = q.shape
    out, lse = _forward(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _equal_offsets(batch, length),
        _equal_offsets(batch, k.shape[1]),
        None if key_mask is None else key_mask.flatten(),
        scale,
    )
    return _in_order_of(q, out), lse.view(heads, batch, length).transpose(0, 1).contiguous()


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
    if offsets is not None:
        saved = (grad_out, grad_lse, q, k, v, out, lse)
        return _backward(*saved, offsets, key_offsets, key_mask, scale)
    batch, length = q.shape[:2]
    grads = _backward(
        grad_out.flatten(0, 1),
        grad_lse.transpose(0, 1).flatten(1),
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        out.flatten(0, 1),
        lse.transpose(0, 1).flatten(1),
        _equal_offsets(batch, length),
        _equal_offsets(batch, k.shape[1]),
        None if key_mask is None else key_mask.flatten(),
        scale,
    )
    return _in_order_of(q, grads[0]), _in_order_of(k, grads[1]), _in_order_of(k, grads[2])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    key_offsets = offsets if key_offsets is None else key_offsets
    if key_mask is not None:
        kept, key_offsets = _kept_keys(key_mask, key_offsets)
        k, v = k[kept], v[kept]
    q, k, v = unit_stride(q, k, v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    out[int(offsets[-1]) :], lse[:, int(offsets[-1]) :] = 0.0, 0.0
    for run in _runs(offsets, key_offsets):
        if run.empty:
            out[run.rows], lse[:, run.rows] = 0.0, -torch.inf
            continue
        result, result_lse = _fused(run.queries_of(q), run.keys_of(k), run.keys_of(v), scale=scale)
        run.queries_of(out).copy_(result)
        run.queries_of(lse.t()[..., None]).copy_(result_lse[..., None])
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused backward knows no gradient of the log-sum-exp. Where there is one it enters as a second backward:
    with dS += P dlse, dQ += scale dlse (P K) and dK += scale P^T (dlse Q), the value gradient for values K and
    output gradient dlse Q.
    """
    key_offsets = offsets if key_offsets is None else key_offsets
    kept, key_rows = None, k.shape[0]
    if key_mask is not None:
        kept, key_offsets = _kept_keys(key_mask, key_offsets)
        k, v = k[kept], v[kept]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    grad_q[int(offsets[-1]) :] = 0.0
    for gradient in (grad_k, grad_v):
        gradient[int(key_offsets[-1]) :] = 0.0
    grad_out, q, k, v, out = unit_stride(grad_out, q, k, v, out)
    for run in _runs(offsets, key_offsets):
        if run.empty:
            grad_q[run.rows], grad_k[run.key_rows], grad_v[run.key_rows] = 0.0, 0.0, 0.0
            continue
        query, key, value = run.queries_of(q), run.keys_of(k), run.keys_of(v)
        sums = run.queries_of(lse.t()[..., None])[..., 0]
        result = _fused_backward(
            *(run.queries_of(grad_out), query, key, value, run.queries_of(out), sums),
            *(0.0, False),
            scale=scale,
        )
        targets = run.queries_of(grad_q), run.keys_of(grad_k), run.keys_of(grad_v)
        for target, gradient in zip(targets, result, strict=True):
            target.copy_(gradient)
        grad_sums = run.queries_of(grad_lse.t()[..., None])
        if grad_sums.any():
            weighted = (grad_sums * query * scale).to(q.dtype)
            mean_key, _ = _fused(query, key, key, scale=scale)
            targets[0].add_((grad_sums * mean_key * scale).to(q.dtype))
            targets[1].add_(
                _fused_backward(weighted, query, key, key, mean_key, sums, 0.0, False, scale=scale)[
                    2
                ]
            )
    if kept is not None:
        grad_k, grad_v = (
            x.new_zeros((key_rows, *x.shape[1:])).index_copy_(0, kept, x) for x in (grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v


class _Run:
    """``count`` successive sequences of equal length, seen as a dense (count, heads, length, D) batch."""

    def __init__(self, count: int, start: int, length: int, key_start: int, keys: int) -> None:
        self.count, self.empty = count, length == 0 or keys == 0
        self.rows = slice(start, start + count * length)
        self.key_rows = slice(key_start, key_start + count * keys)

    def queries_of(self, packed: Tensor) -> Tensor:
        return packed[self.rows].unflatten(0, (self.count, -1)).transpose(1, 2)

    def keys_of(self, packed: Tensor) -> Tensor:
        return packed[self.key_rows].unflatten(0, (self.count, -1)).transpose(1, 2)


def _runs(offsets: Tensor, key_offsets: Tensor) -> Iterator[_Run]:
    """The packed sequences in runs of equal (query, key) length."""
    start = key_start = 0
    lengths = zip(offsets.diff().tolist(), key_offsets.diff().tolist(), strict=True)
    for (length, keys), members in itertools.groupby(lengths):
        count = len(list(members))
        yield _Run(count, start, length, key_start, keys)
        start, key_start = start + count * length, key_start + count * keys


def _kept_keys(key_mask: Tensor, key_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the keys that take part, and the offsets among them."""
    used = key_mask[: int(key_offsets[-1])]
    counts = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    return used.nonzero()[:, 0], counts[key_offsets.long()]


def _in_order_of(dense: Tensor, packed: Tensor) -> Tensor:
    result = packed.view(dense.shape)
    return empty_rows(dense).copy_(result) if sequence_first(dense) else result


def _equal_offsets(batch: int, length: int) -> Tensor:
    return torch.arange(batch + 1) * length
