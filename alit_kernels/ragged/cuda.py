"""CUDA implementations of the ragged ops (csrc/ragged/ragged_cuda.h): Python allocates, kernels move rows.

Nothing synchronises; lengths and offsets stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from .._cpp import TYPES, pointer
from .rows import row_bytes, strides, with_rows

#: Flags of csrc/ragged/ragged_cuda.h.
MESSAGES = {
    1: "offsets: expected an ascending sequence from 0, within the rows packed",
    2: "capacity: too small for the rows there are",
    4: "target_row: expected -1 or a row of the output",
    8: "lengths: expected 0 or more, at most as many as there are positions",
}


def cumulative_offsets(lengths: Tensor) -> Tensor:
    lengths = lengths.to(torch.int64).contiguous()
    offsets = lengths.new_empty(lengths.shape[0] + 1, dtype=torch.int32)
    _launch("cumulative_offsets", lengths, pointer(lengths), lengths.shape[0], pointer(offsets))
    return offsets


def pack(padded: Tensor, offsets: Tensor, capacity: int) -> Tensor:
    padded, offsets = with_rows(padded, 2), offsets.contiguous()
    out = padded.new_empty((capacity, *padded.shape[2:]))
    _launch(
        "pack",
        padded,
        *(pointer(padded), *strides(padded, 2), padded.shape[1]),
        *(pointer(offsets), offsets.shape[0] - 1, pointer(out), capacity, row_bytes(padded, 2)),
    )
    return out


def unpack(packed: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    packed, offsets = with_rows(packed, 1), offsets.contiguous()
    out = packed.new_empty((offsets.shape[0] - 1, max_length, *packed.shape[1:]))
    _launch(
        "unpack",
        packed,
        *(pointer(packed), *strides(packed, 1), packed.shape[0]),
        *(pointer(offsets), offsets.shape[0] - 1, *_pattern(fill, packed.dtype)),
        *(pointer(out), max_length, row_bytes(packed, 1)),
    )
    return out


def compact(
    packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    packed, offsets, keep = with_rows(packed, 1), offsets.contiguous(), keep.contiguous()
    rows = packed.shape[0]
    out = packed.new_empty((capacity, *packed.shape[1:]))
    new_offsets, source_row = torch.empty_like(offsets), offsets.new_empty(capacity)
    scratch = offsets.new_empty(rows + 1 + _cuda.library().alit_cuda_tiles(rows))
    _launch(
        "compact",
        packed,
        *(pointer(packed), *strides(packed, 1), rows),
        *(pointer(offsets), offsets.shape[0] - 1, pointer(keep), pointer(out)),
        *(pointer(new_offsets), pointer(source_row), capacity, row_bytes(packed, 1)),
        pointer(scratch),
    )
    return out, new_offsets, source_row


def scatter_rows(values: Tensor, target_row: Tensor, rows: int) -> Tensor:
    values, target_row = with_rows(values, 1), target_row.to(torch.int32).contiguous()
    out = values.new_empty((rows, *values.shape[1:]))
    scratch = target_row.new_empty(rows)
    _launch(
        "scatter_rows",
        values,
        *(pointer(values), *strides(values, 1), values.shape[0]),
        *(pointer(target_row), pointer(out), rows, row_bytes(values, 1), pointer(scratch)),
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
    _launch(
        "append",
        packed,
        *(pointer(packed), *strides(packed, 1), packed.shape[0]),
        *(pointer(offsets), offsets.shape[0] - 1),
        *(pointer(rows), 0 if shared else sequence_stride, row_stride, rows.shape[1]),
        *(pointer(select), pointer(out), pointer(new_offsets), capacity, row_bytes(packed, 1)),
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
    _launch(
        "append_backward",
        grad,
        *(pointer(grad), *strides(grad, 1), grad.shape[0]),
        *(pointer(offsets), pointer(new_offsets), offsets.shape[0] - 1, pointer(select)),
        *(pointer(grad_packed), rows, pointer(grad_rows), added, int(shared)),
        *(row_bytes(grad, 1), TYPES[grad.dtype] if shared else 0),
    )
    return grad_packed, grad_rows


def tail_mask(tokens: Tensor, lengths: Tensor, fill: Tensor) -> Tensor:
    tokens, fill = with_rows(tokens, 2), fill.contiguous()
    lengths = lengths.to(torch.int64).contiguous()
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    _launch(
        "tail_mask",
        tokens,
        *(pointer(tokens), *strides(tokens, 2)),
        *(pointer(lengths), *tokens.shape[:2], pointer(fill), pointer(out), row_bytes(tokens, 2)),
    )
    return out


def tail_mask_backward(grad: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    grad, lengths = with_rows(grad, 2), lengths.to(torch.int64).contiguous()
    sequences, length, width = grad.shape
    grad_tokens = torch.empty_like(grad, memory_format=torch.contiguous_format)
    grad_fill = grad.new_empty(width)
    blocks = sequences * _cuda.library().alit_cuda_sum_blocks(length)
    scratch = grad.new_empty((blocks, width), dtype=torch.float32)
    _launch(
        "tail_mask_backward",
        grad,
        *(pointer(grad), *strides(grad, 2), pointer(lengths)),
        *(sequences, length, pointer(grad_tokens), pointer(grad_fill)),
        *(row_bytes(grad, 2), TYPES[grad.dtype], pointer(scratch)),
    )
    return grad_tokens, grad_fill


def _launch(name: str, like: Tensor, *arguments: int) -> None:
    _cuda.launch(name, like.device, *arguments, messages=MESSAGES)


def _pattern(fill: float, dtype: torch.dtype) -> tuple[int, int]:
    """The fill value, repeated over 16 bytes, as two integers."""
    element = torch.full((1,), fill, dtype=dtype)
    data = bytes(element.view(torch.uint8).tolist()) * (16 // element.element_size())
    low, high = (int.from_bytes(part, "little", signed=True) for part in (data[:8], data[8:]))
    return low, high
