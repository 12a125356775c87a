"""Limits of the multiprocessors of GPUs, and the occupancy of a kernel on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a multiprocessor (CUDA C++ programming guide, technical specifications per compute capability).

    ``fma`` is the number of scheduler cycles of a float32 warp instruction, ``matrix`` the 16-bit multiply-adds of a
    scheduler's tensor core per cycle.
    """

    shared: int
    shared_block: int
    fma: int
    matrix: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 512


LIMITS = {
    80: Limits(164 << 10, 163 << 10, fma=2, matrix=256),
    86: Limits(100 << 10, 99 << 10, fma=1, matrix=128, warps=48, blocks=16),
    89: Limits(100 << 10, 99 << 10, fma=1, matrix=128, warps=48, blocks=24),
    90: Limits(228 << 10, 227 << 10, fma=1, matrix=512),
    100: Limits(228 << 10, 227 << 10, fma=1, matrix=1024),
    120: Limits(100 << 10, 99 << 10, fma=1, matrix=128, warps=48, blocks=24),
}


def occupancy(arch: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
    """Resident warps over the most an SM can hold: the theoretical occupancy of the occupancy calculator."""
    limits = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // per_warp // warps,
        limits.shared // (shared + 1024),  # the system keeps 1 KiB per block
        limits.tensor_columns // tensor_columns if tensor_columns else limits.blocks,
    )
    return blocks * warps / limits.warps
