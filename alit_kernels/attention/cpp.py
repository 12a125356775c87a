"""Attention in C++ (csrc/attention): one pass forward, one backward, parallel over sequences and heads.

Deterministic whatever is asked for, and whatever the thread count. Half-precision inputs are converted to float32; the
scores and probabilities between the products are never rounded to less. One exception: where the processor multiplies
bfloat16 (AVX512-BF16), such inputs stay as they are, and probabilities and their gradients are rounded to bfloat16, as
on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cpp import core, instruction_set, pointer, threads, type_code
from .layout import empty_rows, unit_stride


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, None, None, key_mask, scale)


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
    return _backward(grad_out, grad_lse, q, k, v, out, lse, None, None, key_mask, scale)


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
    out, lse = _forward(q, k, v, offsets, key_offsets, key_mask, scale)
    used = int(offsets[-1])
    out[used:], lse[:, used:] = 0.0, 0.0
    return out, lse


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
    grads = _backward(grad_out, grad_lse, q, k, v, out, lse, offsets, key_offsets, key_mask, scale)
    keys = offsets if key_offsets is None else key_offsets
    for gradient, ends in zip(grads, (offsets, keys, keys), strict=True):
        gradient[int(ends[-1]) :] = 0.0
    return grads


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    out, lse = empty_rows(q), q.new_empty((*batch, heads, rows), dtype=torch.float32)
    q, k, v = unit_stride(q, k, v)
    problem = _problem(q, k, offsets, key_offsets, key_mask, scale)
    core().attention(
        *(problem, _rows(q), _rows(k), _rows(v), _rows(out), _sums(lse)),
        *(threads(), instruction_set()),
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_rows(q), empty_rows(k), empty_rows(k)
    grad_out, q, k, v, out = unit_stride(grad_out, q, k, v, out)
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    problem = _problem(q, k, offsets, key_offsets, key_mask, scale)
    core().attention_backward(
        *(problem, _rows(grad_out), _sums(grad_lse), _rows(q), _rows(k), _rows(v), _rows(out)),
        *(_sums(lse), *map(_rows, grads), threads(), instruction_set()),
    )
    return grads


def _problem(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Any:
    """The core's description of the call, which keeps what it points to alive."""
    offsets = None if offsets is None else offsets.contiguous()
    key_offsets = offsets if key_offsets is None else key_offsets.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = core().AttentionProblem(
        sequences=q.shape[0] if offsets is None else offsets.shape[0] - 1,
        heads=q.shape[-2],
        dim=q.shape[-1],
        type=type_code(q),
        offsets=pointer(offsets),
        length=q.shape[-3],
        key_offsets=pointer(key_offsets),
        key_length=k.shape[-3],
        mask=pointer(key_mask),
        mask_sequence=0 if key_mask is None or key_mask.ndim == 1 else key_mask.shape[1],
        scale=scale,
    )
    problem.tensors = (offsets, key_offsets, key_mask)
    return problem


def _rows(x: Tensor) -> Any:
    """Packed rows have no stride between sequences."""
    return core().AttentionRows(pointer(x), 0 if x.ndim == 3 else x.stride(0), *x.stride()[-3:-1])


def _sums(x: Tensor) -> Any:
    return core().AttentionSums(pointer(x), 0 if x.ndim == 2 else x.stride(0), x.stride(-2))
