"""Plain PyTorch definitions of the ragged ops: no host synchronization, no branch on values.

T rows, B sequences; ``offsets`` (B + 1,) int32: sequence b owns rows ``offsets[b]`` to ``offsets[b + 1] - 1``. Rows
at and beyond ``offsets[-1]`` are never read and are zero in every output. Outputs are contiguous, whatever inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def cumulative_offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def sequence_and_position(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence (clamped into range), position in it, and in-use flag of each of ``rows`` packed rows, (rows,) each."""
    row = torch.arange(rows, device=offsets.device)
    sequences = offsets.shape[0] - 1
    sequence = torch.searchsorted(offsets[1:].long().contiguous(), row, right=True)
    used = sequence < sequences
    sequence = sequence.clamp(max=max(sequences - 1, 0))
    return sequence, row - offsets.long()[sequence], used


def _take(rows: Tensor, index: Tensor, keep: Tensor, fill: float = 0.0) -> Tensor:
    """``rows[index]`` where ``keep`` and in range, ``fill`` elsewhere."""
    if rows.shape[0] == 0:
        return rows.new_full(index.shape + rows.shape[1:], fill)
    keep = keep & (index >= 0) & (index < rows.shape[0])
    taken = rows[torch.where(keep, index, 0)]
    filler = torch.full((), fill, dtype=rows.dtype, device=rows.device)
    return torch.where(_like(keep, taken), taken, filler).contiguous()


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """``mask`` with trailing dimensions of size 1, as many as ``values`` has."""
    return mask.view(mask.shape + (1,) * (values.ndim - mask.ndim))


def pack(padded: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    offsets = cumulative_offsets(lengths)
    return pack_by_offsets(padded, offsets, capacity), offsets


def pack_by_offsets(padded: Tensor, offsets: Tensor, rows: int) -> Tensor:
    sequence, position, used = sequence_and_position(offsets, rows)
    length = padded.shape[1]
    return _take(padded.flatten(0, 1), sequence * length + position, used & (position < length))


def unpack(packed: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    start, stop = offsets[:-1].long(), offsets[1:].long()
    row = start[:, None] + torch.arange(max_length, device=packed.device)
    return _take(packed, row, row < stop[:, None], fill)


unpack_backward = pack_by_offsets


def compact(
    packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = packed.shape[0]
    row = torch.arange(rows, device=packed.device)
    kept = keep & (row < offsets[-1])
    kept_before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    new_offsets = kept_before[offsets.long().clamp(0, rows)].to(torch.int32)
    target = torch.where(kept, kept_before[:-1], capacity).clamp(max=capacity)
    source_row = torch.full((capacity + 1,), -1, dtype=torch.int64, device=packed.device)
    source_row = source_row.scatter(0, target, row)[:capacity]
    target_row = torch.where(target < capacity, target, -1)
    kept_rows = _take(packed, source_row, source_row >= 0)
    return kept_rows, new_offsets, source_row.to(torch.int32), target_row.to(torch.int32)


def compact_backward(grad: Tensor, target_row: Tensor) -> Tensor:
    return _take(grad, target_row.long(), target_row >= 0)


def append(
    packed: Tensor, offsets: Tensor, rows: Tensor, select: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor]:
    added = rows.shape[rows.ndim - packed.ndim]
    lengths = offsets.diff().long()
    new_offsets = cumulative_offsets(lengths + added * (1 if select is None else select))
    sequence, position, used = sequence_and_position(new_offsets, capacity)
    # One length more than there are sequences, for rows that belong to none.
    fresh = position - torch.nn.functional.pad(lengths, (0, 1))[sequence]
    old = _take(packed, offsets.long()[sequence] + position, used & (fresh < 0))
    rows = rows.expand(lengths.shape[0], *rows.shape[-packed.ndim :]).flatten(0, 1)
    new = _take(rows, sequence * added + fresh, used & (fresh >= 0))
    return torch.where(_like(fresh < 0, old), old, new).contiguous(), new_offsets


def append_backward(
    grad: Tensor,
    offsets: Tensor,
    new_offsets: Tensor,
    select: Tensor | None,
    rows: int,
    added: int,
    shared: bool,
    packed_wanted: bool,
    rows_wanted: bool,
) -> tuple[Tensor, Tensor]:
    grad_packed = grad_rows = grad.new_empty(0)
    if packed_wanted:
        sequence, position, used = sequence_and_position(offsets, rows)
        grad_packed = _take(grad, new_offsets.long()[sequence] + position, used)
    if rows_wanted:
        first = new_offsets[:-1].long() + offsets.diff()
        index = first[:, None] + torch.arange(added, device=grad.device)
        chosen = torch.ones_like(first, dtype=torch.bool) if select is None else select
        grad_rows = _take(grad, index, chosen[:, None].expand_as(index))
        grad_rows = grad_rows.sum(0) if shared else grad_rows
    return grad_packed, grad_rows


def tail_mask(tokens: Tensor, lengths: Tensor, fill: Tensor) -> Tensor:
    return torch.where(_inside(tokens, lengths), tokens, fill).contiguous()


def tail_mask_backward(
    grad: Tensor, lengths: Tensor, tokens_wanted: bool, fill_wanted: bool
) -> tuple[Tensor, Tensor]:
    grad_tokens = grad_fill = grad.new_empty(0)
    inside = _inside(grad, lengths)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    if tokens_wanted:
        grad_tokens = torch.where(inside, grad, zero).contiguous()
    if fill_wanted:
        dtype = accumulation_dtype(grad)
        grad_fill = torch.where(inside, zero, grad).sum((0, 1), dtype=dtype).to(grad.dtype)
    return grad_tokens, grad_fill.contiguous()


def _inside(tokens: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None]
