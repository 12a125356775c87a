"""Arguments of the core's entry points (csrc/ragged): each op's inputs, and its outputs, which Python allocates.

A tensor stands for its address. A row is everything behind the leading dimensions, as bytes; the leading dimensions may
have any strides, which are in bytes too. Nothing here looks at a value: lengths and offsets stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from .._cpp import type_code
from .._cuda import Arguments

Entries = Mapping[str, Callable[..., Arguments]]


def rows_of(tensor: Tensor, leading: int) -> Arguments:
    """Rows and the strides of their ``leading`` dimensions; a copy where a row itself is not contiguous."""
    tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.is_contiguous():
        row = tensor.as_strided(tensor.shape[leading:], tensor.stride()[leading:])
        tensor = tensor if row.is_contiguous() else tensor.contiguous()
    size, strides = tensor.element_size(), tensor.stride()
    return (tensor, *[size * strides[i] for i in range(leading)])


def row_bytes(tensor: Tensor, leading: int) -> int:
    return math.prod(tensor.shape[leading:]) * tensor.element_size()


def packed(rows: Tensor, offsets: Tensor) -> Arguments:
    """Packed rows and their stride, the number of rows, the offsets, and the number of sequences."""
    return *rows_of(rows, 1), rows.shape[0], offsets.contiguous(), offsets.shape[0] - 1


def _added(rows: Tensor, leading: int) -> Arguments:
    """Rows of each sequence, their strides, and their number; sequences that share rows have a stride of 0."""
    tensor, *strides = rows_of(rows, leading)
    return tensor, *(strides if leading == 2 else (0, *strides)), rows.shape[leading - 1]


def _lengths(lengths: Tensor) -> Arguments:
    return lengths.contiguous(), lengths.element_size()


def _selection(select: Tensor | None) -> Tensor | int:
    return 0 if select is None else select.contiguous()


def _wanted(place: int, first: bool, second: bool, out: tuple[Tensor, Tensor]) -> Tensor | int:
    """One of two gradients; 0, no address, where it is not wanted."""
    return out[place] if (first, second)[place] else 0


#: Entry points that C++ and CUDA have in common. C++ takes the number of threads besides, CUDA its scratch memory.
COMMON: Entries = {
    "cumulative_offsets": lambda lengths, offsets: (
        *_lengths(lengths),
        lengths.shape[0],
        offsets,
    ),
    "pack": lambda padded, lengths, capacity, out: (
        *rows_of(padded, 2),
        padded.shape[1],
        *_lengths(lengths),
        lengths.shape[0],
        *out,
        capacity,
        row_bytes(padded, 2),
    ),
    "unpack_backward": lambda grad, offsets, rows, out: (
        *rows_of(grad, 2),
        grad.shape[1],
        offsets.contiguous(),
        offsets.shape[0] - 1,
        out,
        rows,
        row_bytes(grad, 2),
    ),
    "compact": lambda rows, offsets, keep, capacity, out: (
        *packed(rows, offsets),
        keep.contiguous(),
        *out,
        capacity,
        row_bytes(rows, 1),
    ),
    "compact_backward": lambda grad, target_row, out: (
        *rows_of(grad, 1),
        grad.shape[0],
        target_row.contiguous(),
        out,
        target_row.shape[0],
        row_bytes(grad, 1),
    ),
    "append": lambda rows, offsets, fresh, select, capacity, out: (
        *packed(rows, offsets),
        *_added(fresh, 1 + fresh.ndim - rows.ndim),
        _selection(select),
        *out,
        capacity,
        row_bytes(rows, 1),
    ),
    "append_backward": lambda grad, offsets, new_offsets, select, rows, added, shared, *wanted_out: (
        *rows_of(grad, 1),
        grad.shape[0],
        offsets.contiguous(),
        new_offsets.contiguous(),
        offsets.shape[0] - 1,
        _selection(select),
        _wanted(0, *wanted_out),
        rows,
        _wanted(1, *wanted_out),
        added,
        shared,
        row_bytes(grad, 1),
        type_code(grad) if shared and wanted_out[1] else 0,
    ),
    "tail_mask": lambda tokens, lengths, fill, out: (
        *rows_of(tokens, 2),
        *_lengths(lengths),
        *tokens.shape[:2],
        fill.contiguous(),
        out,
        row_bytes(tokens, 2),
    ),
    "tail_mask_backward": lambda grad, lengths, *wanted_out: (
        *rows_of(grad, 2),
        *_lengths(lengths),
        *grad.shape[:2],
        _wanted(0, *wanted_out),
        _wanted(1, *wanted_out),
        row_bytes(grad, 2),
        type_code(grad),
    ),
}
