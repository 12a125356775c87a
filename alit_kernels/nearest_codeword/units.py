"""Normalized vectors for Triton kernels: the same whatever their tiles, but for the last bit, rarely."""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-12)


@triton.jit
def norms(b_x):
    """max(norm, 1e-12) of rows (rows, channels) float32, in float64."""
    b_wide = b_x.to(tl.float64)
    return tl.maximum(tl.sqrt(tl.sum(b_wide * b_wide, 1)), EPSILON)


@triton.jit
def wide_units(b_x):
    """Rows divided by max(norm, 1e-12), in float64."""
    return b_x.to(tl.float64) * (1.0 / norms(b_x))[:, None]


@triton.jit
def units(b_x):
    """Rows divided by max(norm, 1e-12), rounded once to float32."""
    return wide_units(b_x).to(tl.float32)
