"""Launches of the Triton attention kernels: the op's implementation ``triton``.

dK and dV are summed by the program that owns their rows, dQ likewise: deterministic, without atomics. A single pass
with atomic additions to dQ would save two of seven products per tile and pay for them with float32 traffic to dQ for
each block of keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._triton import cdiv, device_of
from . import kernels
from .configurations import Tile, fuses, map_tile, padded, tile
from .layout import MAX_PITCH, empty_rows, empty_sums
from .problem import Problem


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, offsets, key_offsets, _, _, key_mask, scale = problem
    out, lse = empty_rows(q), empty_sums(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    q, _, scale = _with_positive_scale(q, scale)
    launch = _tile("forward", q)
    _launch(
        kernels.forward_kernel,
        _grid(launch, q, offsets),
        *(q, k, v, _bytes(key_mask), out, lse, *_both(offsets, key_offsets)),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(out)),
        *(*_sum_strides(lse), _mask_stride(key_mask)),
        *(*_sizes(q, k, offsets), *_scales(scale)),
        **_options(launch, q),
    )
    return out, lse


def attention_backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, offsets, key_offsets, _, _, key_mask, scale = problem
    grad_q, grad_k, grad_v = empty_rows(q), empty_rows(k), empty_rows(k)
    grad_out, q, k, v, out = (_rows(x) for x in (grad_out, q, k, v, out))
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    q, sign, scale = _with_positive_scale(q, scale)
    delta, normaliser, mask = torch.empty_like(lse), torch.empty_like(lse), _bytes(key_mask)
    both, scales = _both(offsets, key_offsets), _scales(scale)
    shared_strides = (*_sum_strides(lse), _mask_stride(key_mask))
    launch = _tile("backward_queries", q)
    _launch(
        kernels.backward_queries_kernel,
        _grid(launch, q, offsets),
        *(q, k, v, mask, out, grad_out, grad_lse, lse, delta, normaliser, grad_q, *both),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(grad_out)),
        *(*_strides(grad_q), *shared_strides, *_sizes(q, k, offsets), *scales),
        **_options(launch, q),
    )
    launch = _tile("backward_keys", q)
    _launch(
        kernels.backward_keys_kernel,
        _grid(launch, k, offsets),
        *(q, k, v, mask, grad_out, delta, normaliser, grad_k, grad_v, *both),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), *_strides(grad_k)),
        *(*shared_strides, *_sizes(q, k, offsets), *scales),
        **_options(launch, q),
    )
    return (grad_q if sign > 0 else grad_q * sign), grad_k, grad_v


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
    q, k, lse = _rows(q), _rows(k), lse.contiguous()
    q, _, scale = _with_positive_scale(q, scale)
    batch, queries, keys = offsets.shape[0] - 1, query_stop - query_start, key_stop - key_start
    result = q.new_empty((batch, queries, keys), dtype=torch.float32)
    size, warps = map_tile(q.dtype)
    grid = (batch, cdiv(queries, size), cdiv(keys, size))  # only the first may exceed 65535
    _launch(
        kernels.map_kernel,
        grid,
        *(q, k, lse, result, offsets.contiguous(), *q.stride()[:2], *k.stride()[:2], lse.stride(0)),
        *(q.shape[0], query_start, query_stop, key_start, key_stop, q.shape[1], *_scales(scale)),
        ROWS=size,
        COLUMNS=size,
        **_widths(q),
        num_warps=warps,
        num_stages=2,
    )
    return result


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the current stream of the first argument's device; an empty grid is nothing to do."""
    if all(grid):
        with device_of(arguments[0]):
            kernel[grid](*arguments, **options)


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, int, float]:
    """The kernels take the maximum of unscaled scores, so the scale must be positive: its sign goes into q (a copy)."""
    if scale > 0:
        return q, 1, scale
    sign = -1 if scale < 0 else 0
    return q * sign, sign, -scale if scale < 0 else 1.0


def _scales(scale: float) -> tuple[float, float]:
    """For natural exponentials, and for powers of two."""
    return scale, scale * math.log2(math.e)


def _rows(x: Tensor) -> Tensor:
    """``x`` as the kernels address it: unit stride in the last dimension, a row pitch below 2^24; else one copy."""
    return x if x.stride(-1) == 1 and x.stride(-3) < MAX_PITCH else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, row and head; packed rows have no batch."""
    *batch, row, head, _ = x.stride()
    return (*batch, row, head) if batch else (0, row, head)


def _sum_strides(lse: Tensor) -> tuple[int, int]:
    """Of batch and head."""
    return (0, lse.stride(0)) if lse.ndim == 2 else (lse.stride(0), lse.stride(1))


def _mask_stride(key_mask: Tensor | None) -> int:
    return 0 if key_mask is None or key_mask.ndim == 1 else key_mask.shape[1]


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _both(offsets: Tensor | None, key_offsets: Tensor | None) -> tuple[Tensor | None, ...]:
    offsets = None if offsets is None else offsets.contiguous()
    return offsets, offsets if key_offsets is None else key_offsets.contiguous()


def _sizes(q: Tensor, k: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """Sequences; and of queries and keys the dense length, or the number of packed rows."""
    sequences = q.shape[0] if offsets is None else offsets.shape[0] - 1
    return sequences, q.shape[-3], k.shape[-3]


def _grid(launch: Tile, tiled: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    heads = tiled.shape[-2]
    if offsets is None:
        return tiled.shape[0] * cdiv(tiled.shape[1], launch.rows), heads
    return cdiv(tiled.shape[0], launch.rows) + offsets.shape[0] - 1, heads


def _tile(kernel: str, q: Tensor) -> Tile:
    # In the interpreter there is no GPU to ask; any entry serves.
    architecture = _architecture(q.device) if q.is_cuda else 90
    return tile(kernel, q.shape[-1], q.dtype, architecture)


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _widths(q: Tensor) -> dict[str, Any]:
    width = q.shape[-1]
    return {
        "HEAD_DIM": width,
        "BLOCK_D": padded(width),
        "enable_fp_fusion": fuses(q.dtype),
    }


def _options(launch: Tile, q: Tensor) -> dict[str, Any]:
    return {
        "TILE": launch.rows,
        "STEP": launch.columns,
        "MASK_ALL": launch.mask_all,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        **_widths(q),
    }
