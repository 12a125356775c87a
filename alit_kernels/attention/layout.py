"""Memory layout of results: the rows in the order of the input's rows, so that nothing around attention transposes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .problem import Fused, Problem

#: Row pitch, in elements, below which the Triton kernels' offsets within a tile fit 32 bits.
MAX_PITCH = 1 << 24


def empty_rows(like: Tensor) -> Tensor:
    """Uninitialized tensor of shape and dtype of ``like``: (T, H, D) contiguous, or (B, N, H, D) contiguous.

    Where the batch runs faster than the rows (a view of sequence-first memory), so does the result's. ``like`` has to
    be the input as it was given, not a copy of it: ``torch.compile`` relies on the strides that follow from it.
    """
    if sequence_first(like):
        batch, rows, *rest = like.shape
        return like.new_empty((rows, batch, *rest)).transpose(0, 1)
    return like.new_empty(like.shape)


def empty_gradients(x: Problem, keys_wanted: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Uninitialized results of the backward, and in them gradients of q, k and v: of q alone unless ``keys_wanted``.
    For q, k and v given as one tensor the result is one gradient.
    """
    if not isinstance(x, Fused):
        keys = (empty_rows(x.k), empty_rows(x.k)) if keys_wanted else ()
        gradients = empty_rows(x.q), *keys
        return gradients, gradients
    *rows, heads, width = x.q.shape
    if sequence_first(x.q):
        gradient = x.q.new_empty((*rows[::-1], 3, heads, width)).transpose(0, 1)
    else:
        gradient = x.q.new_empty((*rows, 3, heads, width))
    return (gradient,), gradient.unbind(-3)


def laid_out(x: Problem, gradients: Iterable[Tensor], keys_wanted: bool) -> tuple[Tensor, ...]:
    """Gradients of q, k and v as the backward returns them."""
    results, parts = empty_gradients(x, keys_wanted)
    for part, gradient in zip(parts, gradients, strict=False):
        part.copy_(gradient)
    return results


def empty_sums(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialized tensor of one number per query and head: (H, T), or (B, H, N)."""
    *batch, rows, heads, _ = q.shape
    return q.new_empty((*batch, heads, rows), dtype=dtype)


def sequence_first(x: Tensor) -> bool:
    """True if (B, N, H, D) is a view of memory that goes (N, B, H, D), its rows less than ``MAX_PITCH`` apart."""
    if x.ndim != 4 or x.stride(0) >= x.stride(1):
        return False
    batch, _, heads, width = x.shape
    return batch * heads * width < MAX_PITCH


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where their last dimension is not contiguous."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
