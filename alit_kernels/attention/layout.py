"""Memory layout of results: the rows in the order of the input's rows, so that nothing around attention transposes."""

from __future__ import annotations

import torch
from torch import Tensor

#: Row pitch, in elements, below which the Triton kernels' offsets within a tile fit 32 bits.
MAX_PITCH = 1 << 24


def empty_rows(like: Tensor) -> Tensor:
    """Uninitialised, of shape and dtype of ``like``: (T, H, D) contiguous, or (B, N, H, D) contiguous.

    Where the batch runs faster than the rows (a view of sequence-first memory), so does the result's. ``like`` has to
    be the input as it was given, not a copy of it: ``torch.compile`` relies on the strides that follow from it.
    """
    if sequence_first(like):
        batch, rows, *rest = like.shape
        return like.new_empty((rows, batch, *rest)).transpose(0, 1)
    return like.new_empty(like.shape)


def empty_sums(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised, a number for each query and head: (H, T), or (B, H, N)."""
    *batch, rows, heads, _ = q.shape
    return q.new_empty((*batch, heads, rows), dtype=dtype)


def sequence_first(x: Tensor) -> bool:
    """Whether (B, N, H, D) is a view of memory that goes (N, B, H, D), its rows less than ``MAX_PITCH`` apart."""
    if x.ndim != 4 or x.stride(0) >= x.stride(1):
        return False
    batch, _, heads, width = x.shape
    return batch * heads * width < MAX_PITCH


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Those whose last dimension is not contiguous, copied."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
