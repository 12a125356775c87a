"""Compile every Triton kernel for GPUs that are not here, and read the machine code.

Every ``kernels.py`` of an op has ``builds() -> Iterator[Build]``: one :class:`Build` for each kernel and shipped launch
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Build:
    """One kernel at one shipped configuration.

    Attributes:
        kernel: the ``triton.jit`` function.
        label: what the table calls it: "forward d=64 bfloat16 M128 N64".
        signature: argument -> Triton type ("*bf16", "*fp32", "i32", "fp32"); constants are left out.
        constants: ``tl.constexpr`` argument -> value.
        divisible: arguments that are multiples of 16 at a real launch (pointers of fresh tensors, row pitches).
        num_warps, num_stages: launch options.
        architectures: those it is shipped for.
        tensor_core: the kernel declares a tensor-core product: matrix instructions must appear.
        wgmma: on sm_90 that product must be ``wgmma`` (tiles of at least 64 rows and 4 warps).
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    architectures: tuple[int, ...] = ARCHITECTURES
    tensor_core: bool = False
    wgmma: bool = False
