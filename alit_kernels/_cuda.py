"""Shared Python side of the CUDA implementations: launching on torch's stream, and device-side errors.

Values of device tensors are not checked before a launch, which would synchronize: kernels stay within bounds whatever
they read. ``ALIT_KERNELS_DEBUG=1`` makes them report what did not fit; each op then waits for its report and raises.
Set it before the first call: plans repeat calls without it.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._core import extension

DEBUG_VARIABLE = "ALIT_KERNELS_DEBUG"
Arguments = tuple[Tensor | int, ...]


class _State(threading.local):
    #: Called with each launch: name of the entry point, arguments.
    recorder: Callable[[str, Arguments], None] | None = None


_state = _State()


@contextmanager
def recorded(recorder: Callable[[str, Arguments], None]) -> Iterator[None]:
    """Context manager: this thread's launches are told to ``recorder`` too."""
    before, _state.recorder = _state.recorder, recorder
    try:
        yield
    finally:
        _state.recorder = before


def library() -> Any:
    """The compiled extension, which has the entry points; CUDA implementations are chosen only where it has CUDA."""
    module = extension()
    assert module is not None
    return module


@functools.cache
def _entry(core: Any, name: str) -> Any:
    return getattr(core, f"alit_cuda_{name}")


def unpacked(name: str) -> int:
    """Address of the entry point's form that takes one array: stream, device, error flag, then the arguments."""
    return library().unpacked[f"alit_cuda_{name}"]


def launch(
    name: str,
    device: torch.device,
    *arguments: Tensor | int,
    messages: Mapping[int, str] | None = None,
) -> None:
    """Call the entry point ``alit_cuda_NAME`` with torch's current stream of ``device`` and the arguments.

    Args:
        arguments: integers; tensors stand for their addresses.
        messages: error flag -> its message.

    Raises:
        RuntimeError: CUDA refused the launch.
        ValueError: in debug mode, what the kernels flagged.
    """
    if _state.recorder is not None:
        _state.recorder(name, arguments)
    debug = os.environ.get(DEBUG_VARIABLE, "0") == "1"
    flags = torch.zeros(1, dtype=torch.int32, device=device) if debug else None
    entry, error = _entry(library(), name), 0 if flags is None else flags.data_ptr()
    numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    if device.type != "cuda":  # emulated
        code = entry(0, 0, error, *numbers)
    else:
        index = device.index
        with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
            code = entry(torch._C._cuda_getCurrentRawStream(index), index, error, *numbers)
    if code != 0:
        raise RuntimeError(f"alit_kernels.{name}: CUDA error {code} at launch")
    if flags is not None and (found := int(flags.item())):
        told = [text for flag, text in (messages or {}).items() if found & flag]
        raise ValueError(f"alit_kernels.{name}: " + "; ".join(told))
