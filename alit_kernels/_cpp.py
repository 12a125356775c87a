"""What the Python side of every C++ implementation needs: the core, type codes, the thread count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import extension

#: Codes of ``alit::Type`` in csrc/types.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def core() -> Any:
    """The compiled extension; implementations are only chosen where it is installed."""
    module = extension()
    assert module is not None
    return module


def type_code(tensor: Tensor) -> int:
    return TYPES[tensor.dtype]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def threads() -> int:
    return torch.get_num_threads()
