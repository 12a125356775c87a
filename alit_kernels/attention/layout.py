"""Memory layout of results: the rows in the order of the input's rows, so that nothing around attention transposes."""

from __future__ import annotations

from torch import Tensor


def empty_rows(like: Tensor) -> Tensor:
    """Uninitialised, of shape and dtype of ``like``: (T, H, D) contiguous, or (B, N, H, D) contiguous.

    Where the batch runs faster than the rows (a view of sequence-first memory), so does the result's.
    """
    if sequence_first(like):
        batch, rows, *rest = like.shape
        return like.new_empty((rows, batch, *rest)).transpose(0, 1)
    return like.new_empty(like.shape)


def sequence_first(x: Tensor) -> bool:
    return x.ndim == 4 and x.stride(0) < x.stride(1)
