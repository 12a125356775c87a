"""The compiled core, ``alit_kernels._C``, and what of it has a stand-in where it is not installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

#: Signatures that are remembered in one place.
MOST_KNOWN = 4096


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


def _signature() -> Callable[..., bytes | None]:
    core = extension()
    if core is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return lambda *_: None
    return core.signature


#: (*arguments) -> bytes, equal for calls that differ in the contents and addresses of tensors alone; None where an
#: argument is none of torch's own tensors, None, bool, int, float, str or dtype, or where nothing can tell.
signature = _signature()


def remember(known: set[bytes], key: bytes) -> None:
    """Add a signature; where there are too many, all are forgotten."""
    if len(known) >= MOST_KNOWN:
        known.clear()
    known.add(key)
