"""C++ implementations of the ragged ops (csrc/ragged/ragged.h): Python allocates, C++ moves rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import core, pointer, threads, type_code
from .rows import row_bytes, strides, with_rows


def cumulative_offsets(lengths: Tensor) -> Tensor:
    lengths = lengths.to(torch.int64).contiguous()
    offsets = lengths.new_empty(lengths.shape[0] + 1, dtype=torch.int32)
    core().cumulative_offsets(pointer(lengths), lengths.shape[0], pointer(offsets))
    return offsets


def pack(padded: Tensor, offsets: Tensor, capacity: int) -> Tensor:
    padded, offsets = with_rows(padded, 2), offsets.contiguous()
    out = padded.new_empty((capacity, *padded.shape[2:]))
    core().pack(
        *(pointer(padded), *strides(padded, 2), padded.shape[1]),
        *(pointer(offsets), offsets.shape[0] - 1, pointer(out), capacity),
        *(row_bytes(padded, 2), threads()),
    )
    return out


def unpack(packed: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    packed, offsets = with_rows(packed, 1), offsets.contiguous()
    element = torch.full((1,), fill, dtype=packed.dtype)
    out = packed.new_empty((offsets.shape[0] - 1, max_length, *packed.shape[1:]))
    core().unpack(
        *(pointer(packed), *strides(packed, 1), packed.shape[0]),
        *(pointer(offsets), offsets.shape[0] - 1, pointer(element), packed.element_size()),
        *(pointer(out), max_length, row_bytes(packed, 1), threads()),
    )
    return out


def compact(
    packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    packed, offsets, keep = with_rows(packed, 1), offsets.contiguous(), keep.contiguous()
    out = packed.new_empty((capacity, *packed.shape[1:]))
    new_offsets, source_row = torch.empty_like(offsets), offsets.new_empty(capacity)
    core().compact(
        *(pointer(packed), *strides(packed, 1), packed.shape[0]),
        *(pointer(offsets), offsets.shape[0] - 1, pointer(keep)),
        *(pointer(out), pointer(new_offsets), pointer(source_row), capacity),
        *(row_bytes(packed, 1), threads()),
    )
    return out, new_offsets, source_row


def scatter_rows(values: Tensor, target_row: Tensor, rows: int) -> Tensor:
    values, target_row = with_rows(values, 1), target_row.to(torch.int32).contiguous()
    out = values.new_empty((rows, *values.shape[1:]))
    core().scatter_rows(
        *(pointer(values), *strides(values, 1), values.shape[0], pointer(target_row)),
        *(pointer(out), rows, row_bytes(values, 1), threads()),
    )
    return out


def append(
    packed: Tensor, offsets: Tensor, rows: Tensor, select: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    shared = rows.ndim == packed.ndim
    packed, offsets, select = with_rows(packed, 1), offsets.contiguous(), select.contiguous()
    rows = with_rows(rows[None] if shared else rows, 2)
    sequence_stride, row_stride = strides(rows, 2)
    out = packed.new_empty((capacity, *packed.shape[1:]))
    new_offsets = torch.empty_like(offsets)
    core().append(
        *(pointer(packed), *strides(packed, 1), packed.shape[0]),
        *(pointer(offsets), offsets.shape[0] - 1),
        *(pointer(rows), 0 if shared else sequence_stride, row_stride, rows.shape[1]),
        *(pointer(select), pointer(out), pointer(new_offsets), capacity),
        *(row_bytes(packed, 1), threads()),
    )
    return out, new_offsets


def append_backward(
    grad: Tensor,
    offsets: Tensor,
    new_offsets: Tensor,
    select: Tensor,
    rows: int,
    added: int,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    grad, select = with_rows(grad, 1), select.contiguous()
    offsets, new_offsets = offsets.contiguous(), new_offsets.contiguous()
    leading = (added,) if shared else (select.shape[0], added)
    grad_packed = grad.new_empty((rows, *grad.shape[1:]))
    grad_rows = grad.new_empty((*leading, *grad.shape[1:]))
    core().append_backward(
        *(pointer(grad), *strides(grad, 1), grad.shape[0]),
        *(pointer(offsets), pointer(new_offsets), offsets.shape[0] - 1, pointer(select)),
        *(pointer(grad_packed), rows, pointer(grad_rows), added, shared),
        *(row_bytes(grad, 1), type_code(grad) if shared else 0, threads()),
    )
    return grad_packed, grad_rows


def tail_mask(tokens: Tensor, lengths: Tensor, fill: Tensor) -> Tensor:
    tokens, lengths, fill = with_rows(tokens, 2), lengths.to(torch.int64), fill.contiguous()
    lengths = lengths.contiguous()
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    core().tail_mask(
        *(pointer(tokens), *strides(tokens, 2), pointer(lengths), *tokens.shape[:2]),
        *(pointer(fill), pointer(out), row_bytes(tokens, 2), threads()),
    )
    return out


def tail_mask_backward(grad: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    grad, lengths = with_rows(grad, 2), lengths.to(torch.int64).contiguous()
    grad_tokens = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grad_fill = grad.new_empty(grad.shape[2:])
    core().tail_mask_backward(
        *(pointer(grad), *strides(grad, 2), pointer(lengths), *grad.shape[:2]),
        *(pointer(grad_tokens), pointer(grad_fill)),
        *(row_bytes(grad, 2), type_code(grad), threads()),
    )
    return grad_tokens, grad_fill
