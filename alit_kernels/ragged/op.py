"""Public functions, schemas, checks and autograd of the ragged ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    FLOATING,
    INTEGER,
    check_count,
    check_number,
    check_offsets,
    check_same,
    check_tensor,
    shown,
)
from .._cpp import TYPES
from .._library import Op
from . import reference


def cumulative_offsets(lengths: Tensor, *, implementation: str = "auto") -> Tensor:
    """Row offsets of packed sequences: ``[0, l0, l0 + l1, ...]``.

    Args:
        lengths: (B,) int32 or int64, each at least 0, their sum below 2^31.

    Returns:
        (B + 1,) int32.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also negative lengths or a sum of 2^31 or more.
    """
    check_tensor("lengths", lengths, dtype=INTEGER, ndim=1)
    return _cumulative_offsets(lengths, implementation=implementation)


def pack(
    padded: Tensor, lengths: Tensor, *, capacity: int, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Drop padding: the first ``lengths[b]`` rows of each sequence, one behind another.

    Args:
        padded: (B, N, ...) of any dtype; floating dtypes are differentiable.
        lengths: (B,) int32 or int64, each in 0..N.
        capacity: rows of the output; a static bound for ``lengths.sum()``. Rows beyond the sum are zero.

    Returns:
        packed (capacity, ...), offsets (B + 1,) int32.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also lengths out of range or a capacity too
        small. On CUDA rows that do not fit are dropped: nothing is written out of bounds.
    """
    check_tensor("padded", padded)
    if padded.ndim < 2:
        raise ValueError(
            f"padded: expected at least 2 dimensions (B, N, ...), got shape {tuple(padded.shape)}"
        )
    check_tensor("lengths", lengths, dtype=INTEGER, shape=(padded.shape[0],))
    check_same("device", padded=padded, lengths=lengths)
    check_count("capacity", capacity)
    offsets = cumulative_offsets(lengths, implementation=implementation)
    return _pack(padded, offsets, capacity, implementation=implementation), offsets


def unpack(
    packed: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    fill: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Inverse of :func:`pack`: one padded row per sequence.

    Args:
        packed: (T, ...) of any dtype; floating dtypes are differentiable. Rows from ``offsets[-1]`` on are not read.
        offsets: (B + 1,) int32.
        max_length: positions of the output; a static bound for the longest sequence.
        fill: value of the positions beyond a sequence's end, one that the dtype and a float64 hold.

    Returns:
        (B, max_length, ...), dtype of ``packed``.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also offsets that do not fit.
    """
    _check_packed(packed, offsets)
    check_same("device", packed=packed, offsets=offsets)
    check_count("max_length", max_length)
    fill = 0.0 if type(fill) is float and fill == 0 else _fill(fill, packed.dtype)
    return _unpack(packed, offsets, max_length, fill, implementation=implementation)


def compact(
    packed: Tensor, offsets: Tensor, keep: Tensor, *, capacity: int, implementation: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep some rows of every sequence, in order, and close the gaps.

    Args:
        packed: (T, ...) of any dtype; floating dtypes are differentiable.
        offsets: (B + 1,) int32.
        keep: (T,) bool; entries from ``offsets[-1]`` on are ignored.
        capacity: rows of the output; a static bound for the rows kept.

    Returns:
        packed (capacity, ...), offsets (B + 1,) int32, source_row (capacity,) int32: the input row of each output row,
        -1 where the output row is not in use (and zero).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also offsets that do not fit or a capacity too
        small.
    """
    _check_packed(packed, offsets)
    check_tensor("keep", keep, dtype=torch.bool, shape=packed.shape[:1])
    check_same("device", packed=packed, offsets=offsets, keep=keep)
    check_count("capacity", capacity)
    return _compact(packed, offsets, keep, capacity, implementation=implementation)


def append(
    packed: Tensor,
    offsets: Tensor,
    rows: Tensor,
    *,
    select: Tensor | None = None,
    capacity: int,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Lengthen every chosen sequence by L rows.

    Args:
        packed: (T, ...) of any dtype; floating dtypes are differentiable.
        offsets: (B + 1,) int32.
        rows: (L, ...), the same for every sequence (its gradient is summed over the chosen ones), or (B, L, ...).
        select: (B,) bool, the sequences that grow; all by default.
        capacity: rows of the output; a static bound for the new total.

    Returns:
        packed (capacity, ...), offsets (B + 1,) int32.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also offsets that do not fit or a capacity too
        small.
    """
    _check_packed(packed, offsets)
    check_tensor("rows", rows)
    sequences, feature = offsets.shape[0] - 1, tuple(packed.shape[1:])
    shapes = ((None, *feature), (sequences, None, *feature))
    if rows.ndim not in (packed.ndim, packed.ndim + 1):
        raise ValueError(
            f"rows: expected (L, ...) or (B, L, ...) like packed, got shape {tuple(rows.shape)}"
        )
    check_tensor("rows", rows, shape=shapes[rows.ndim - packed.ndim])
    if select is None:
        select = torch.ones(sequences, dtype=torch.bool, device=packed.device)
    check_tensor("select", select, dtype=torch.bool, shape=(sequences,))
    check_same("dtype", packed=packed, rows=rows)
    check_same("device", packed=packed, offsets=offsets, rows=rows, select=select)
    check_count("capacity", capacity)
    return _append(packed, offsets, rows, select, capacity, implementation=implementation)


def tail_mask(
    tokens: Tensor, lengths: Tensor, fill: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Nested dropout: what lies at and beyond each kept length becomes the mask token.

    Args:
        tokens: (B, N, C) floating point.
        lengths: (B,) int32 or int64; a length of N or more keeps everything, one of 0 or less nothing.
        fill: (C,) mask token, dtype of ``tokens``; its gradient is the sum over masked positions.

    Returns:
        (B, N, C), dtype of ``tokens``.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    check_tensor("tokens", tokens, dtype=FLOATING, ndim=3)
    check_tensor("lengths", lengths, dtype=INTEGER, shape=tokens.shape[:1])
    check_tensor("fill", fill, shape=tokens.shape[2:])
    check_same("dtype", tokens=tokens, fill=fill)
    check_same("device", tokens=tokens, lengths=lengths, fill=fill)
    return _tail_mask(tokens, lengths, fill, implementation=implementation)


def _fill(fill: Any, dtype: torch.dtype) -> float:
    """``fill`` as a float, which ``dtype`` holds too."""
    floating = dtype.is_floating_point or dtype.is_complex
    if floating and isinstance(fill, float) and not math.isfinite(fill):
        return fill
    number = check_number("fill", fill)
    if isinstance(fill, int) and int(number) != fill:
        raise ValueError(f"fill: expected a number that a float64 holds, got {shown(fill)}")
    if floating:
        low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    else:
        low, high = (
            (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        )
    if not low <= number <= high or not (floating or number.is_integer()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"fill: expected a number that {name} holds, got {fill}")
    return number


def _check_packed(packed: Tensor, offsets: Tensor) -> None:
    check_tensor("packed", packed)
    if packed.ndim < 1:
        raise ValueError("packed: expected at least 1 dimension (T, ...), got a scalar")
    check_tensor("offsets", offsets, dtype=torch.int32, ndim=1)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected at least one entry (B + 1), got none")


def _check_lengths(lengths: Tensor) -> None:
    if lengths.numel() and lengths.min() < 0:
        raise ValueError(f"lengths: expected at least 0, got {int(lengths.min())}")
    lengths = lengths.long()  # an int32 tensor compares with 2^31 as with -2^31
    # Only of numbers below 2^31 a tensor's sum does not wrap.
    if lengths.numel() and (lengths.max() >= 2**31 or lengths.sum() >= 2**31):
        raise ValueError(f"lengths: expected a sum below 2^31, got {sum(lengths.tolist())}")


def _check_pack(padded: Tensor, offsets: Tensor, capacity: int) -> None:
    lengths = offsets.diff()
    if lengths.numel() and lengths.max() > padded.shape[1]:
        raise ValueError(
            f"lengths: expected at most N = {padded.shape[1]}, got {int(lengths.max())}"
        )
    _check_capacity(capacity, int(offsets[-1]))


def _check_capacity(capacity: int, needed: int) -> None:
    if needed > capacity:
        raise ValueError(f"capacity: expected at least {needed} rows, got {capacity}")


def _check_unpack(packed: Tensor, offsets: Tensor, max_length: int, fill: float) -> None:
    check_offsets("offsets", offsets, packed.shape[0], max_length)


def _check_compact(packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    _check_capacity(capacity, int(keep[: int(offsets[-1])].sum()))


def _check_append(
    packed: Tensor, offsets: Tensor, rows: Tensor, select: Tensor, capacity: int
) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    _check_capacity(
        capacity, int(offsets[-1]) + int(select.sum()) * rows.shape[rows.ndim - packed.ndim]
    )


def _unsummed(grad: Tensor, *rest: Any) -> str:
    """Rows of any type can be moved; those that sequences share have to be summed."""
    return f"{grad.dtype} gradients of shared rows" if rest[-1] and grad.dtype not in TYPES else ""


def _others(name: str) -> dict[str, str]:
    return {
        implementation: f"alit_kernels.ragged.{implementation}:{name}"
        for implementation in ("cpp", "cuda")
    }


_cumulative_offsets = Op(
    "cumulative_offsets(Tensor lengths) -> Tensor",
    reference=reference.cumulative_offsets,
    others=_others("cumulative_offsets"),
    fake=lambda lengths: lengths.new_empty(lengths.shape[0] + 1, dtype=torch.int32),
    check=_check_lengths,
)
_pack = Op(
    "pack(Tensor padded, Tensor offsets, SymInt capacity) -> Tensor",
    reference=reference.pack,
    others=_others("pack"),
    fake=lambda padded, offsets, capacity: padded.new_empty((capacity, *padded.shape[2:])),
    check=_check_pack,
)
_unpack = Op(
    "unpack(Tensor packed, Tensor offsets, SymInt max_length, float fill) -> Tensor",
    reference=reference.unpack,
    others=_others("unpack"),
    fake=lambda packed, offsets, max_length, fill: packed.new_empty(
        (offsets.shape[0] - 1, max_length, *packed.shape[1:])
    ),
    check=_check_unpack,
)
_compact = Op(
    "compact(Tensor packed, Tensor offsets, Tensor keep, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    reference=reference.compact,
    others=_others("compact"),
    fake=lambda packed, offsets, keep, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        torch.empty_like(offsets),
        offsets.new_empty(capacity),
    ),
    check=_check_compact,
)
_scatter_rows = Op(
    "scatter_rows(Tensor values, Tensor target_row, SymInt rows) -> Tensor",
    reference=reference.scatter_rows,
    others=_others("scatter_rows"),
    fake=lambda values, target_row, rows: values.new_empty((rows, *values.shape[1:])),
)
_append = Op(
    "append(Tensor packed, Tensor offsets, Tensor rows, Tensor select, SymInt capacity) -> (Tensor, Tensor)",
    reference=reference.append,
    others=_others("append"),
    fake=lambda packed, offsets, rows, select, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        torch.empty_like(offsets),
    ),
    check=_check_append,
)
_append_backward = Op(
    "append_backward(Tensor grad, Tensor offsets, Tensor new_offsets, Tensor select, SymInt rows, SymInt added,"
    " bool shared) -> (Tensor, Tensor)",
    reference=reference.append_backward,
    others=_others("append_backward"),
    limits={"cpp": _unsummed, "cuda": _unsummed},
    fake=lambda grad, offsets, new_offsets, select, rows, added, shared: (
        grad.new_empty((rows, *grad.shape[1:])),
        grad.new_empty(
            (added, *grad.shape[1:]) if shared else (select.shape[0], added, *grad.shape[1:])
        ),
    ),
)
_tail_mask = Op(
    "tail_mask(Tensor tokens, Tensor lengths, Tensor fill) -> Tensor",
    reference=reference.tail_mask,
    others=_others("tail_mask"),
    fake=lambda tokens, lengths, fill: torch.empty_like(
        tokens, memory_format=torch.contiguous_format
    ),
)
_tail_mask_backward = Op(
    "tail_mask_backward(Tensor grad, Tensor lengths) -> (Tensor, Tensor)",
    reference=reference.tail_mask_backward,
    others=_others("tail_mask_backward"),
    fake=lambda grad, lengths: (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        grad.new_empty(grad.shape[2:]),
    ),
)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, offsets, _, ctx.implementation = inputs
    ctx.save_for_backward(offsets)
    ctx.length = padded.shape[1]


def _backward_pack(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    return _unpack(grad, offsets, ctx.length, 0.0, implementation=ctx.implementation), None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, offsets, _, _, ctx.implementation = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = packed.shape[0]


def _backward_unpack(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    return _pack(grad, offsets, ctx.rows, implementation=ctx.implementation), None, None, None


def _setup_compact(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.rows, ctx.implementation = inputs[0].shape[0], inputs[-1]
    ctx.save_for_backward(output[2])


def _backward_compact(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    (source_row,) = ctx.saved_tensors
    return (
        _scatter_rows(grad, source_row, ctx.rows, implementation=ctx.implementation),
        None,
        None,
        None,
    )


def _setup_append(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    packed, offsets, rows, select, _, ctx.implementation = inputs
    ctx.save_for_backward(offsets, output[1], select)
    ctx.rows, ctx.shared = packed.shape[0], rows.ndim == packed.ndim
    ctx.added = rows.shape[rows.ndim - packed.ndim]


def _backward_append(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    offsets, new_offsets, select = ctx.saved_tensors
    grad_packed, grad_rows = _append_backward(
        grad,
        offsets,
        new_offsets,
        select,
        ctx.rows,
        ctx.added,
        ctx.shared,
        implementation=ctx.implementation,
    )
    return grad_packed, None, grad_rows, None, None


def _setup_tail_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lengths, _, ctx.implementation = inputs
    ctx.save_for_backward(lengths)


def _backward_tail_mask(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (lengths,) = ctx.saved_tensors
    grad_tokens, grad_fill = _tail_mask_backward(grad, lengths, implementation=ctx.implementation)
    return grad_tokens, None, grad_fill


_pack.register_autograd(_backward_pack, _setup_pack)
_unpack.register_autograd(_backward_unpack, _setup_unpack)
_compact.register_autograd(_backward_compact, _setup_compact)
_append.register_autograd(_backward_append, _setup_append)
_tail_mask.register_autograd(_backward_tail_mask, _setup_tail_mask)
