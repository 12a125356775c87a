"""Shared host side of all Triton kernels: launches, GPUs, layouts. Imports no Triton."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._launcher import launcher

#: 10 times the compute capability that launch tables assume where there is no GPU to ask.
target = 90
Recorder = Callable[[Any, tuple[int, ...], dict[str, Any]], None]


class _State(threading.local):
    #: Called with launches, as (kernel, grid, arguments and options), in place of a GPU.
    recorder: Recorder | None = None


_state = _State()


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Context manager: this thread's launches are given to ``recorder`` instead of a GPU."""
    before, _state.recorder = _state.recorder, recorder
    try:
        yield
    finally:
        _state.recorder = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = True,
    **arguments: Any,
) -> None:
    """Launch on the current stream of the first argument's device; do nothing for an empty grid."""
    if not all(grid):
        return
    arguments["num_warps"] = num_warps
    arguments["num_stages"] = num_stages
    arguments["enable_fp_fusion"] = enable_fp_fusion
    if _state.recorder is None:
        _launcher()(kernel, grid, **arguments)
    else:
        _state.recorder(kernel, grid, arguments)


def through_triton(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Any:
    """Launch by Triton's own means, and return the compiled kernel."""
    with torch.cuda.device_of(next(iter(arguments.values()))):  # nothing on the CPU (interpreter)
        return kernel[grid](**arguments)


@functools.cache
def _launcher() -> Callable[..., Any]:
    return launcher(through_triton) or through_triton


def architecture(device: torch.device) -> int:
    """10 times the compute capability of a GPU; ``target`` where there is none, or where launches are recorded."""
    return _capability(device) if device.type == "cuda" else target


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., D) as (N, D) with a contiguous last dimension; copied only where strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
