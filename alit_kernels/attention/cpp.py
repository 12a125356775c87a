"""Attention in C++ (csrc/attention): one pass forward, one backward, parallel over sequences and heads.

Deterministic, whatever the thread count. Half-precision inputs are converted to float32; the
scores and probabilities between the products are never rounded to less. One exception: where the processor multiplies
bfloat16 (AVX512-BF16), such inputs stay as they are, and probabilities and their gradients are rounded to bfloat16, as
on a GPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._cpp import core, instruction_set, pointer, threads, type_code
from .layout import empty_rows, empty_sums, unit_stride


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
    out, lse = empty_rows(q), empty_sums(q)
    q, k, v = unit_stride(q, k, v)
    problem = _problem(q, k, offsets, key_offsets, key_mask, scale)
    core().attention(
        *(problem, _rows(q), _rows(k), _rows(v), _rows(out), _sums(lse)),
        *(threads(), instruction_set()),
    )
    if offsets is not None:
        used = int(offsets[-1])
        out[used:], lse[:, used:] = 0.0, 0.0
    return out, lse


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
    grads = empty_rows(q), empty_rows(k), empty_rows(k)
    grad_out, q, k, v, out = unit_stride(grad_out, q, k, v, out)
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    problem = _problem(q, k, offsets, key_offsets, key_mask, scale)
    core().attention_backward(
        *(problem, _rows(grad_out), _sums(grad_lse), _rows(q), _rows(k), _rows(v), _rows(out)),
        *(_sums(lse), *map(_rows, grads), threads(), instruction_set()),
    )
    if offsets is not None:
        keys = offsets if key_offsets is None else key_offsets
        for gradient, ends in zip(grads, (offsets, keys, keys), strict=True):
            gradient[int(ends[-1]) :] = 0.0
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
