"""What the launchers of all Triton kernels share. Imports no Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What Triton's signatures call the element types.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def device_of(tensor: Tensor) -> Any:
    """Context in which kernels are launched on the tensor's device; nothing on the CPU (interpreter)."""
    return torch.cuda.device_of(tensor)


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., D) as (N, D) with a contiguous last dimension; copied only where strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
