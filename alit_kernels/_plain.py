"""Tests for calls that our ops compute as torch's would: plain tensors, and nothing that watches operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PARAMETER, _STRIDED = torch.nn.Parameter, torch.strided


def is_plain(*tensors: Any) -> bool:
    """True if all are dense tensors of torch's own types: no subclass, sparse or nested one."""
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not _PARAMETER:
            return False
        if x.layout is not _STRIDED or x.is_nested:
            return False
    return True


def watched() -> bool:
    """True if a transform, tracer or dispatch mode is active, which knows torch's operators but not ours."""
    return not torch.compiler.is_compiling() and bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    )
