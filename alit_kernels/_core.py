"""The compiled core, ``alit_kernels._C``, and what of it has a stand-in where it is not installed."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
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
    """Whether the core can look into torch's tensors: by DLPack's exchange API 1.3, which torch has from 2.10 on."""
    core = extension()
    if core is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return False
    try:
        core.signature()
    except RuntimeError as error:
        logging.getLogger("alit_kernels").info("calls are not remembered: %s", error)
        return False
    return True


def _unknown(*_: Any) -> None:
    return None


#: (*arguments) -> bytes, equal for calls that differ in the contents and addresses of tensors alone; None where an
#: argument is none of torch's own tensors, None, bool, int, float, str or dtype, or where nothing can tell.
signature: Callable[..., bytes | None] = extension().signature if sees_tensors() else _unknown
