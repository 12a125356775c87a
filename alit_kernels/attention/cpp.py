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
from .layout import empty_gradients, empty_rows, empty_sums, unit_stride
from .problem import Problem


def attention(x: Problem) -> tuple[Tensor, Tensor]:
    out, lse = empty_rows(x.q), empty_sums(x.q)
    q, k, v = unit_stride(x.q, x.k, x.v)
    problem = _core_problem(x)
    core().attention(
        problem, _rows(q), _rows(k), _rows(v), _rows(out), _sums(lse), threads(), instruction_set()
    )
    if x.offsets is not None:
        used = int(x.offsets[-1])
        out[used:], lse[:, used:] = 0.0, 0.0
    return out, lse


def attention_backward(
    x: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keys_wanted: bool,
) -> tuple[Tensor, ...]:
    results, (grad_q, *grad_keys) = empty_gradients(x, keys_wanted)
    grad_k, grad_v = grad_keys if keys_wanted else (empty_rows(x.k), empty_rows(x.k))
    grad_out, q, k, v, out = unit_stride(grad_out, x.q, x.k, x.v, out)
    lse = lse.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    problem = _core_problem(x)
    core().attention_backward(
        problem,
        _rows(grad_out),
        _sums(grad_lse),
        _rows(q),
        _rows(k),
        _rows(v),
        _rows(out),
        _sums(lse),
        _rows(grad_q),
        _rows(grad_k),
        _rows(grad_v),
        threads(),
        instruction_set(),
    )
    ends, key_ends = x.ends
    if ends is not None:
        grad_q[int(ends[-1]) :] = 0.0
        grad_k[int(key_ends[-1]) :] = 0.0
        grad_v[int(key_ends[-1]) :] = 0.0
    return results


def _core_problem(x: Problem) -> Any:
    """The core's description of the call, which keeps what it points to alive."""
    offsets, key_offsets, key_mask, key_stop = *x.ends, x.key_mask, x.key_stop
    if offsets is not None:
        offsets, key_offsets = offsets.contiguous(), key_offsets.contiguous()
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    if key_stop is not None and key_stop.stride(-1) != 1:
        key_stop = key_stop.contiguous()
    *_, length, heads, width = x.q.shape
    problem = core().AttentionProblem(
        sequences=x.q.shape[0] if offsets is None else offsets.shape[0] - 1,
        heads=heads,
        dim=width,
        type=type_code(x.q),
        offsets=pointer(offsets),
        length=length,
        key_offsets=pointer(key_offsets),
        key_length=x.k.shape[-3],
        mask=pointer(key_mask),
        mask_sequence=0 if key_mask is None or key_mask.ndim == 1 else key_mask.shape[1],
        stops=pointer(key_stop),
        stops_sequence=0 if key_stop is None or key_stop.ndim == 1 else key_stop.stride(0),
        scale=x.scale,
    )
    problem.tensors = (offsets, key_offsets, key_mask, key_stop)
    return problem


def _rows(x: Tensor) -> Any:
    """The core's description of rows: address and strides, 0 between sequences of packed rows."""
    return core().AttentionRows(pointer(x), 0 if x.ndim == 3 else x.stride(0), *x.stride()[-3:-1])


def _sums(x: Tensor | None) -> Any:
    if x is None:
        return core().AttentionSums(0, 0, 0)
    return core().AttentionSums(pointer(x), 0 if x.ndim == 2 else x.stride(0), x.stride(-2))
