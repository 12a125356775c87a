"""Tensors as rows of bytes: any strides of the leading dimensions, everything behind them contiguous."""

from __future__ import annotations

import math

from torch import Tensor


def with_rows(tensor: Tensor, leading: int) -> Tensor:
    """The tensor itself where everything behind its first ``leading`` dimensions is contiguous, else a copy."""
    tensor = tensor.resolve_conj().resolve_neg()
    expected = 1
    for size, stride in zip(
        reversed(tensor.shape[leading:]), reversed(tensor.stride()[leading:]), strict=True
    ):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def strides(tensor: Tensor, leading: int) -> list[int]:
    """Strides of the first dimensions, in bytes."""
    return [stride * tensor.element_size() for stride in tensor.stride()[:leading]]


def row_bytes(tensor: Tensor, leading: int) -> int:
    return math.prod(tensor.shape[leading:]) * tensor.element_size()
