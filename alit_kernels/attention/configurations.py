"""Launch configurations of the Triton attention kernels, all on this page, and the work that each of them issues.

One tile for each kernel, head dimension, element size and family of GPUs. No entry has been tuned on a GPU; each
compiles without spills for the architectures it serves, dense and packed, with a key mask and without
(``python -m alit_kernels.aot --module alit_kernels.attention --check``).

Heads wider than 128 are those of a VQGAN's attention, one head of 256 or 512 channels. The accumulators then allow 16
to 64 rows, and every step is masked. Tiles of 256 channels of the first family fit the 99 KiB of shared memory that a
block has on smaller chips (compute capability 8.6, 8.9, 12.0), those of 512 need ``WIDE_SHARED``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from .._triton import next_power_of_2

KERNELS = ("forward", "backward_queries", "backward_keys")
#: Accumulators of wider heads do not fit the registers of a program.
MAX_HEAD_DIM = 512
#: Channels that a kernel splits and multiplies at a time.
CHUNK = 64
#: Bytes of shared memory that tiles of more than 256 channels need, more than a block of smaller GPUs has.
WIDE_SHARED = 132096


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        rows: rows of one program: queries, or keys in the dK/dV kernel. The accumulators have as many rows.
        columns: size of one step of its loop: keys, or queries in the dK/dV kernel.
        warps, stages: launch options of Triton.
        mask_all: every step of the loop is masked. Otherwise the last one is, in code of its own after the loop: twice
            the code, and operands may be kept in registers through the loop for its sake.
        registers: most registers of a thread, where the compiler would keep to fewer of its own accord, and spill.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    mask_all: bool = False
    registers: int | None = None

    def issued(self, rows: int, columns: int) -> int:
        """Entries of one head's score matrix that the matrix instructions compute."""
        return -(-rows // self.rows) * self.rows * -(-columns // self.columns) * self.columns


#: The families of GPUs, by 10 times the compute capability; others take the first.
FAMILIES = (80, 90, 100)
#: (kernel, padded head dimension, bytes per element) -> tile for each family.
#: ``python -m alit_kernels.attention.tune`` times candidates on a GPU and prints the lines of its family.
#:
#: Float32 up to 64 channels: tensor cores by split factors. The three kernels of a head dimension make their products
#: by one kind of instruction (64 rows: ``wgmma`` on sm_90; 32: ``mma``), so that scores round alike; with ``tcgen05``,
#: dK/dV would need more tensor memory than there is. At 128 channels, ``CHUNK`` at a time, the registers suffice with
#: ``wgmma``; with ``mma`` every tile of dK/dV that was tried spills in some build (16 x 32: 8 bytes). There, and for
#: wider heads: no tensor cores.
# fmt: off
TABLE = {
    ("forward", 16, 2): (Tile(64, 64, 4, 3),) * 3,
    ("forward", 32, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
    ("forward", 64, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("forward", 128, 2): (Tile(32, 64, 4, 2, True), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("forward", 256, 2): (Tile(64, 32, 8, 2, True),) * 3,
    ("forward", 512, 2): (Tile(32, 32, 8, 2, True), Tile(64, 16, 8, 2, True), Tile(64, 32, 8, 2, True)),
    ("forward", 16, 4): (Tile(32, 32, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 1, True)),
    ("forward", 32, 4): (Tile(32, 16, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 2, True)),
    ("forward", 64, 4): (Tile(32, 32, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 32, 4, 2, True)),
    ("forward", 128, 4): (Tile(32, 16, 8, 2, True), Tile(64, 32, 4, 1, True), Tile(32, 64, 8, 1, True)),
    ("forward", 256, 4): (Tile(32, 16, 8, 1, True),) * 3,
    ("forward", 512, 4): (Tile(32, 16, 8, 1, True),) * 3,
    ("backward_queries", 16, 2): (Tile(64, 64, 4, 2),) * 3,
    ("backward_queries", 32, 2): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_queries", 64, 2): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_queries", 128, 2): (Tile(64, 32, 4, 2, True), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_queries", 256, 2): (Tile(32, 32, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(64, 32, 8, 2, True)),
    ("backward_queries", 512, 2): (Tile(32, 16, 8, 2, True),) * 3,
    ("backward_queries", 16, 4): (Tile(32, 16, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 2, True)),
    ("backward_queries", 32, 4): (Tile(32, 16, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 2, True)),
    ("backward_queries", 64, 4): (Tile(32, 32, 8, 1, True), Tile(64, 32, 4, 2, True), Tile(32, 32, 8, 1, True)),
    ("backward_queries", 128, 4): (Tile(32, 16, 8, 2, True), Tile(64, 32, 4, 1, True), Tile(32, 32, 8, 2, True)),
    ("backward_queries", 256, 4): (Tile(32, 16, 8, 2, True),) * 3,
    ("backward_queries", 512, 4): (Tile(16, 16, 8, 2, True, 192), Tile(16, 16, 8, 2, True), Tile(16, 16, 8, 2, True)),
    ("backward_keys", 16, 2): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_keys", 32, 2): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_keys", 64, 2): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("backward_keys", 128, 2): (Tile(64, 64, 8, 2, True), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    ("backward_keys", 256, 2): (Tile(32, 32, 8, 2, True),) * 3,
    ("backward_keys", 512, 2): (Tile(16, 32, 8, 2, True),) * 3,
    ("backward_keys", 16, 4): (Tile(32, 16, 4, 2, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 2, True)),
    ("backward_keys", 32, 4): (Tile(32, 16, 4, 1, True), Tile(64, 32, 4, 2, True), Tile(32, 16, 4, 2, True)),
    ("backward_keys", 64, 4): (Tile(32, 16, 4, 2, True), Tile(64, 16, 4, 1, True), Tile(32, 16, 4, 2, True)),
    ("backward_keys", 128, 4): (Tile(32, 32, 8, 2, True), Tile(128, 16, 8, 1, True), Tile(32, 32, 8, 2, True)),
    ("backward_keys", 256, 4): (Tile(32, 16, 8, 1, True),) * 3,
    ("backward_keys", 512, 4): (Tile(16, 16, 8, 1, True),) * 3,
}
# fmt: on


def tile(kernel: str, head_dim: int, dtype: torch.dtype, architecture: int) -> Tile:
    """The launch configuration of one kernel.

    Args:
        kernel: one of ``KERNELS``.
        head_dim: up to ``MAX_HEAD_DIM``.
        architecture: 10 times the compute capability, 80 for sm_80.
    """
    return TABLE[kernel, padded(head_dim), dtype.itemsize][family(architecture)]


def family(architecture: int) -> int:
    """Index of a GPU's family in ``FAMILIES``; 0 for a GPU of none of them."""
    major = architecture // 10 * 10
    return FAMILIES.index(major) if major in FAMILIES else 0


def map_tile(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows (the columns are as many) and warps of one program of the attention map."""
    size, warps = (64, 4) if dtype.itemsize == 2 else (32, 8)
    return (size if head_dim <= 128 else size // 2), warps


def fuses(dtype: torch.dtype) -> bool:
    """True if the compiler may fuse products with sums. Not in float32, where scale s - lse must round its product as
    the log-sum-exp of the forward did: P of large scores is wrong otherwise.
    """
    return dtype != torch.float32


def splits(head_dim: int, dtype: torch.dtype, architecture: int) -> bool:
    """True if tensor cores multiply split factors (``split.py``), but for the attention map: in float32, where parts
    fit the registers (up to 64 channels, on sm_90 up to 128). Other products of float32 are made without tensor cores.
    """
    widest = 128 if FAMILIES[family(architecture)] == 90 else 64
    return dtype == torch.float32 and head_dim <= widest


def padded(head_dim: int) -> int:
    """Head dimension as the kernels see it: the next power of two, at least 16."""
    return max(16, next_power_of_2(head_dim))


def issued_work(launch: Tile, length: int) -> Fraction:
    """Matrix instructions issued / minimum, for self-attention over one sequence of ``length`` tokens.

    The minimum is the true work, ``length`` x ``length`` scores.
    """
    return Fraction(launch.issued(length, length), length * length)
