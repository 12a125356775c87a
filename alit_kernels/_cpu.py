"""Properties of this machine's processor."""

from __future__ import annotations

import functools

import torch


@functools.cache
def mkl_is_slow() -> bool:
    """True on AMD processors with AVX-512, which torch's float32 products leave unused, as far as torch can tell
    (``torch.cpu.get_capabilities``). oneDNN, which torch has on board for its convolutions, and our kernels use it.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities().get
    return bool(has("avx512_f") and has("sse4a"))  # SSE4a is AMD's alone
