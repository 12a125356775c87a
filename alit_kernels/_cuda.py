"""What the Python side of every CUDA implementation needs: launching on torch's stream, and device-side errors.

Values of device tensors are not checked before a launch, which would synchronise: kernels stay within bounds whatever
they read. ``ALIT_KERNELS_DEBUG=1`` makes them report what did not fit; each op then waits for its report and raises.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ._library import extension

DEBUG_VARIABLE = "ALIT_KERNELS_DEBUG"


def library() -> Any:
    """What has the entry points: the compiled extension; CUDA implementations are only chosen where it is built so."""
    module = extension()
    assert module is not None
    return module


@functools.cache
def _entry(core: Any, name: str) -> Any:
    return getattr(core, f"alit_cuda_{name}")


def launch(
    name: str, device: torch.device, *arguments: int, messages: Mapping[int, str] | None = None
) -> None:
    """Call the entry point ``alit_cuda_NAME`` with torch's current stream of ``device`` and the arguments.

    Args:
        messages: error flag -> what it means.

    Raises:
        RuntimeError: CUDA refused the launch.
        ValueError: in debug mode, what the kernels flagged.
    """
    debug = os.environ.get(DEBUG_VARIABLE, "0") == "1"
    flags = torch.zeros(1, dtype=torch.int32, device=device) if debug else None
    entry, error = _entry(library(), name), 0 if flags is None else flags.data_ptr()
    if device.type != "cuda":  # emulated
        code = entry(0, 0, error, *arguments)
    else:
        index = device.index
        with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
            code = entry(torch._C._cuda_getCurrentRawStream(index), index, error, *arguments)
    if code != 0:
        raise RuntimeError(f"alit_kernels.{name}: CUDA error {code} at launch")
    if flags is not None and (found := int(flags.item())):
        told = [text for flag, text in (messages or {}).items() if found & flag]
        raise ValueError(f"alit_kernels.{name}: " + "; ".join(told))
