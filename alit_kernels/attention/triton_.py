"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``.

dK and dV are summed by the program that owns their rows, dQ likewise: deterministic, without atomics. A single pass
with atomic additions to dQ would save two of seven products per tile and pay for them with float32 traffic to dQ for
each block of keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._triton import architecture, cdiv, launch
from . import kernels
from .configurations import CHUNK, Tile, fuses, map_tile, padded, splits, tile
from .layout import MAX_PITCH, empty_gradients, empty_rows, empty_sums
from .problem import Problem


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, offsets, key_offsets, _, _, key_mask, key_stop, scale = problem
    out, lse = empty_rows(q), empty_sums(q)
    q, k, v = _rows(q), _rows(k), _rows(v)
    q, _, scale = _with_positive_scale(q, scale)
    chosen = tile("forward", q.shape[-1], q.dtype, architecture(q.device))
    launch(
        kernels.forward_kernel,
        _grid(chosen, q, offsets),
        **_pointers_and_strides(q=q, k=k, v=v, out=out),
        **_sums(lse, p_lse=lse),
        **_sequences(q, k, offsets, key_offsets, key_mask, key_stop),
        **_scales(scale),
        **_options(chosen, q),
    )
    return out, lse


def attention_backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys_wanted: bool,
) -> tuple[Tensor, ...]:
    q, k, v, offsets, key_offsets, _, _, key_mask, key_stop, scale = problem
    results, (grad_q, *grad_keys) = empty_gradients(problem, keys_wanted)
    grad_out, q, k, v, out = (_rows(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    q, sign, scale = _with_positive_scale(q, scale)
    # Each of these begins at a multiple of 16 bytes.
    sums = 3 if splits(q.shape[-1], q.dtype, architecture(q.device)) else 2
    delta, normalizer, *share = lse.new_empty((sums, cdiv(lse.numel(), 4), 4))
    read = _pointers_and_strides(q=q, k=k, v=v, do=grad_out)
    shared = _sums(lse, p_delta=delta, p_normalizer=normalizer, p_share=share[0] if share else None)
    shared |= _sequences(q, k, offsets, key_offsets, key_mask, key_stop) | _scales(scale)
    chosen = tile("backward_queries", q.shape[-1], q.dtype, architecture(q.device))
    launch(
        kernels.backward_queries_kernel,
        _grid(chosen, q, offsets),
        **read,
        **_pointers_and_strides(out=out, dq=grad_q),
        p_lse=lse,
        p_dlse=None if grad_lse is None else grad_lse.contiguous(),
        **shared,
        **_options(chosen, q),
    )
    if sign <= 0:
        grad_q *= sign
    if not keys_wanted:
        return results
    grad_k, grad_v = grad_keys
    chosen = tile("backward_keys", q.shape[-1], q.dtype, architecture(q.device))
    launch(
        kernels.backward_keys_kernel,
        _grid(chosen, k, offsets),
        **read,
        **_pointers_and_strides(dk=grad_k),
        p_dv=grad_v,
        **shared,
        **_options(chosen, q),
    )
    return results


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
    size, warps = map_tile(q.shape[-1], q.dtype)
    launch(
        kernels.map_kernel,
        # Only the first axis of a grid may exceed 65535.
        (batch, cdiv(queries, size), cdiv(keys, size)),
        p_q=q,
        p_k=k,
        p_lse=lse,
        p_map=result,
        p_offsets=offsets.contiguous(),
        q_r=q.stride(0),
        q_h=q.stride(1),
        k_r=k.stride(0),
        k_h=k.stride(1),
        lse_h=lse.stride(0),
        length=q.shape[0],
        query_start=query_start,
        query_stop=query_stop,
        key_start=key_start,
        key_stop=key_stop,
        heads=q.shape[1],
        **_scales(scale),
        ROWS=size,
        COLUMNS=size,
        **_widths(q),
        num_warps=warps,
        num_stages=2,
    )
    return result


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, int, float]:
    """The kernels take the maximum of unscaled scores, so the scale must be positive: its sign goes into q (a copy)."""
    if scale > 0:
        return q, 1, scale
    sign = -1 if scale < 0 else 0
    return q * sign, sign, -scale if scale < 0 else 1.0


def _rows(x: Tensor) -> Tensor:
    """``x`` as the kernels address it: unit stride in the last dimension, a row pitch below 2^24; else one copy."""
    return x if x.stride(-1) == 1 and x.stride(-3) < MAX_PITCH else x.contiguous()


def _grid(chosen: Tile, tiled: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    heads = tiled.shape[-2]
    if offsets is None:
        return tiled.shape[0] * cdiv(tiled.shape[1], chosen.rows), heads
    return cdiv(tiled.shape[0], chosen.rows) + offsets.shape[0] - 1, heads


# The arguments of the kernels, by their names.


def _pointers_and_strides(**tensors: Tensor) -> dict[str, Any]:
    """Pointers, and strides of batch, row and head; the batch stride of packed rows is 0."""
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        *batch, row, head, _ = x.stride()
        arguments[f"p_{name}"] = x
        arguments[f"{name}_b"] = batch[0] if batch else 0
        arguments[f"{name}_r"] = row
        arguments[f"{name}_h"] = head
    return arguments


def _sums(lse: Tensor, **pointers: Tensor | None) -> dict[str, Any]:
    """``pointers`` to tensors of the layout of ``lse``, and its strides of batch and head."""
    *batch, head, _ = lse.stride()
    return {**pointers, "lse_b": batch[0] if batch else 0, "lse_h": head}


def _sequences(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    key_stop: Tensor | None,
) -> dict[str, Any]:
    """Sequences: offsets, number of sequences, dense lengths or numbers of packed rows; mask and stops."""
    offsets = None if offsets is None else offsets.contiguous()
    if key_stop is not None and key_stop.stride(-1) != 1:
        key_stop = key_stop.contiguous()
    return {
        "p_offsets": offsets,
        "p_key_offsets": offsets if key_offsets is None else key_offsets.contiguous(),
        "sequences": q.shape[0] if offsets is None else offsets.shape[0] - 1,
        "length": q.shape[-3],
        "key_length": k.shape[-3],
        "p_mask": None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "mask_b": 0 if key_mask is None or key_mask.ndim == 1 else key_mask.shape[1],
        "p_stop": key_stop,
        "stop_b": 0 if key_stop is None or key_stop.ndim == 1 else key_stop.stride(0),
    }


def _scales(scale: float) -> dict[str, Any]:
    """Scale for natural exponentials, and for powers of two."""
    return {"scale": scale, "scale_log2": scale * math.log2(math.e)}


def _widths(q: Tensor, split: bool = False) -> dict[str, Any]:
    """Channels, the number of them taken at a time, and whether products may be fused with sums."""
    width = q.shape[-1]
    block = min(padded(width), CHUNK) if split else padded(width)
    return {"HEAD_DIM": width, "BLOCK_D": block, "enable_fp_fusion": fuses(q.dtype)}


def _options(chosen: Tile, q: Tensor) -> dict[str, Any]:
    split = splits(q.shape[-1], q.dtype, architecture(q.device))
    return {
        "TILE": chosen.rows,
        "STEP": chosen.columns,
        "MASK_ALL": chosen.mask_all,
        "SPLIT": split,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        **({} if chosen.registers is None else {"maxnreg": chosen.registers}),
        **_widths(q, split),
    }
