"""What the launchers of all Triton kernels share. Imports no Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Takes launches, as (kernel, arguments and options), in place of a GPU: see ``_builds.Recorder``.
recorder: Callable[[Any, dict[str, Any]], None] | None = None
#: 10 times the compute capability that launch tables choose for where there is no GPU to ask.
target = 90


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = True,
    **arguments: Any,
) -> None:
    """Launch on the current stream of the first argument's device; an empty grid is nothing to do."""
    if not all(grid):
        return
    arguments["num_warps"] = num_warps
    arguments["num_stages"] = num_stages
    arguments["enable_fp_fusion"] = enable_fp_fusion
    if recorder is not None:
        recorder(kernel, arguments)
        return
    with torch.cuda.device_of(next(iter(arguments.values()))):  # nothing on the CPU (interpreter)
        kernel[grid](**arguments)


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
