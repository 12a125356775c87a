"""The compiled core, ``alit_kernels._C``."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch


@functools.cache
def extension() -> Any:
    """The compiled core ``alit_kernels._C``, or None where it is not installed.

    Raises:
        ImportError: the extension is there but broken: a fallback would hide it.
    """
    try:
        return importlib.import_module("alit_kernels._C")
    except ModuleNotFoundError as error:
        if error.name not in ("alit_kernels._C", None):
            raise
        return None


@functools.cache
def sees_tensors() -> bool:
    """True if the core can look into torch's tensors, by DLPack's exchange API 1.3, which torch has from 2.10 on."""
    core = extension()
    if core is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return False
    try:
        core.signature()
    except RuntimeError as error:
        logging.getLogger("alit_kernels").info("calls are not remembered: %s", error)
        return False
    return True
