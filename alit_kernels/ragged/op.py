"""Public functions of the ragged ops, and the checks of their arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import (
    FLOATING,
    INTEGER,
    check_count,
    check_number,
    check_offsets_shape,
    check_same,
    check_tensor,
    shown,
)
from . import schema


def cumulative_offsets(lengths: Tensor, *, implementation: str = "auto") -> Tensor:
    """Row offsets of packed sequences: ``[0, l0, l0 + l1, ...]``.

    Args:
        lengths: (B,) int32 or int64, each at least 0, their sum below 2^31.

    Returns:
        (B + 1,) int32.

    Raises:
        TypeError, ValueError: wrong dtype or shape; on the CPU also negative lengths or a sum of 2^31 or more.
    """
    arguments = lengths, implementation
    if not is_dynamo_compiling() and (found := _known_offsets.call(*arguments)) is not None:
        return found
    check_tensor("lengths", lengths, dtype=INTEGER, ndim=1)
    return _known_offsets.first(arguments, (lengths,))


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
    arguments = padded, lengths, capacity, implementation
    if not is_dynamo_compiling() and (found := _known_pack.call(*arguments)) is not None:
        return found
    check_tensor("padded", padded)
    if padded.ndim < 2:
        raise ValueError(
            f"padded: expected at least 2 dimensions (B, N, ...), got shape {tuple(padded.shape)}"
        )
    check_tensor("lengths", lengths, dtype=INTEGER, shape=(padded.shape[0],))
    check_same("device", padded=padded, lengths=lengths)
    check_count("capacity", capacity)
    return _known_pack.first(arguments, (padded, lengths, capacity))


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
    arguments = packed, offsets, max_length, fill, implementation
    if not is_dynamo_compiling() and (found := _known_unpack.call(*arguments)) is not None:
        return found
    _check_packed(packed, offsets)
    check_same("device", packed=packed, offsets=offsets)
    check_count("max_length", max_length)
    fill = 0.0 if type(fill) is float and fill == 0 else _fill(fill, packed.dtype)
    return _known_unpack.first(arguments, (packed, offsets, max_length, fill))


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
    arguments = packed, offsets, keep, capacity, implementation
    if not is_dynamo_compiling() and (found := _known_compact.call(*arguments)) is not None:
        return found
    _check_packed(packed, offsets)
    check_tensor("keep", keep, dtype=torch.bool, shape=packed.shape[:1])
    check_same("device", packed=packed, offsets=offsets, keep=keep)
    check_count("capacity", capacity)
    return _known_compact.first(arguments, (packed, offsets, keep, capacity), _without_targets)


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
    arguments = packed, offsets, rows, select, capacity, implementation
    if not is_dynamo_compiling() and (found := _known_append.call(*arguments)) is not None:
        return found
    _check_packed(packed, offsets)
    check_tensor("rows", rows)
    sequences, feature = offsets.shape[0] - 1, tuple(packed.shape[1:])
    shapes = ((None, *feature), (sequences, None, *feature))
    if rows.ndim not in (packed.ndim, packed.ndim + 1):
        raise ValueError(
            f"rows: expected (L, ...) or (B, L, ...) like packed, got shape {tuple(rows.shape)}"
        )
    check_tensor("rows", rows, shape=shapes[rows.ndim - packed.ndim])
    if select is not None:
        check_tensor("select", select, dtype=torch.bool, shape=(sequences,))
    check_same("dtype", packed=packed, rows=rows)
    check_same("device", packed=packed, offsets=offsets, rows=rows, select=select)
    check_count("capacity", capacity)
    return _known_append.first(arguments, (packed, offsets, rows, select, capacity))


def tail_mask(
    tokens: Tensor, lengths: Tensor, fill: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Nested dropout: tokens at and beyond each kept length become the mask token.

    Args:
        tokens: (B, N, C) floating point.
        lengths: (B,) int32 or int64; a length of N or more keeps everything, one of 0 or less nothing.
        fill: (C,) mask token, dtype of ``tokens``; its gradient is the sum over masked positions.

    Returns:
        (B, N, C), dtype of ``tokens``.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    arguments = tokens, lengths, fill, implementation
    if not is_dynamo_compiling() and (found := _known_tail_mask.call(*arguments)) is not None:
        return found
    check_tensor("tokens", tokens, dtype=FLOATING, ndim=3)
    check_tensor("lengths", lengths, dtype=INTEGER, shape=tokens.shape[:1])
    check_tensor("fill", fill, shape=tokens.shape[2:])
    check_same("dtype", tokens=tokens, fill=fill)
    check_same("device", tokens=tokens, lengths=lengths, fill=fill)
    return _known_tail_mask.first(arguments, (tokens, lengths, fill))


def _fill(fill: Any, dtype: torch.dtype) -> float:
    """``fill`` as a float, checked to be a value of ``dtype``."""
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
    check_offsets_shape(offsets)


def _without_targets(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found[:3]


_known_offsets, _known_pack, _known_unpack, _known_compact, _known_append, _known_tail_mask = map(
    Public,
    (
        *(schema.cumulative_offsets, schema.pack, schema.unpack),
        *(schema.compact, schema.append, schema.tail_mask),
    ),
)
