"""Launch configurations of the Triton attention kernels, all on this page, and the work that each of them issues.

The table holds tiles by kernel, head dimension (padded to a power of two) and element size. It is one table for every
architecture: no entry has been timed on a GPU yet, each compiles without spills for sm_80, sm_90 and sm_100.

Sequences of a tokenizer are short, so the rows and keys that pad the last tile are a large part of the work. Three
variants deal with them; they differ in the work they issue, never in the result beyond rounding:

* ``simple``: the last tile is a whole one, masked. The default until another is measured to be faster.
* ``tail``: the last keys (in the dK/dV kernel: the last queries) take a tile of 16, of 32, or both, where that is enough.
* ``lean``: ``tail``, and up to 16 remainder rows are folded into the last main program, which shares its keys with
  them; they cost arithmetic and no traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

VARIANTS = ("simple", "tail", "lean")
KERNELS = ("forward", "backward_queries", "backward_keys")
#: Head dimension beyond which no tile of both backward accumulators fits the registers of a program.
MAX_HEAD_DIM = 128
#: Remainder rows that the ``lean`` variant folds into the last main program: one matrix instruction's rows.
FOLD = 16


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        rows: rows of one program: queries, or keys in the dK/dV kernel. The accumulators have as many rows.
        columns: size of one step of its loop: keys, or queries in the dK/dV kernel.
        warps, stages: launch options of Triton.
        tail: a remainder of at most 48 columns takes steps of 32 and 16 in place of a whole one.
        fold: up to this many remainder rows are folded into the last main program.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    tail: str = "last"
    fold: int = 0

    def issued(self, rows: int, columns: int) -> int:
        """Entries of the score matrix that the matrix instructions of one head compute."""
        return self._padded_rows(rows) * self._padded_columns(columns)

    def programs(self, rows: int) -> int:
        """Programs that work on a sequence of this many rows."""
        whole, rest = divmod(rows, self.rows)
        return whole + (0 < rest and not (whole and rest <= self.fold))

    def _padded_rows(self, rows: int) -> int:
        programs = self.programs(rows)
        return programs * self.rows + (self.fold if rows > programs * self.rows else 0)

    def _padded_columns(self, columns: int) -> int:
        whole, rest = divmod(columns, self.columns)
        if self.tail == "fine" and rest <= 48:
            rest = -(-rest // 16) * 16
        elif rest:
            rest = self.columns
        return whole * self.columns + rest


#: (kernel, padded head dimension, bytes per element) -> tile.
TABLE = {
    ("forward", 16, 2): Tile(64, 64, 4, 3),
    ("forward", 32, 2): Tile(64, 64, 4, 3),
    ("forward", 64, 2): Tile(64, 64, 4, 3),
    ("forward", 128, 2): Tile(64, 64, 4, 2),
    ("forward", 16, 4): Tile(32, 64, 4, 2),
    ("forward", 32, 4): Tile(32, 64, 4, 2),
    ("forward", 64, 4): Tile(32, 64, 4, 2),
    ("forward", 128, 4): Tile(32, 64, 8, 1),
    ("backward_queries", 16, 2): Tile(64, 64, 4, 2),
    ("backward_queries", 32, 2): Tile(64, 64, 4, 2),
    ("backward_queries", 64, 2): Tile(64, 64, 4, 2),
    ("backward_queries", 128, 2): Tile(64, 64, 4, 2),
    ("backward_queries", 16, 4): Tile(32, 64, 4, 2),
    ("backward_queries", 32, 4): Tile(32, 64, 4, 2),
    ("backward_queries", 64, 4): Tile(32, 64, 8, 1),
    ("backward_queries", 128, 4): Tile(32, 64, 8, 1),
    ("backward_keys", 16, 2): Tile(64, 64, 4, 2),
    ("backward_keys", 32, 2): Tile(64, 64, 4, 2),
    ("backward_keys", 64, 2): Tile(64, 64, 4, 2),
    ("backward_keys", 128, 2): Tile(64, 32, 4, 2),
    ("backward_keys", 16, 4): Tile(32, 64, 4, 2),
    ("backward_keys", 32, 4): Tile(32, 64, 4, 2),
    ("backward_keys", 64, 4): Tile(32, 32, 8, 1),
    ("backward_keys", 128, 4): Tile(32, 32, 8, 1),
}

_variant = "simple"


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Within the context, attention launches the named variant.

    Raises:
        ValueError: an unknown name.
    """
    global _variant
    if name not in VARIANTS:
        raise ValueError(f"name: expected one of {', '.join(VARIANTS)}, got {name!r}")
    before, _variant = _variant, name
    try:
        yield
    finally:
        _variant = before


def tile(kernel: str, head_dim: int, dtype: torch.dtype, name: str | None = None) -> Tile:
    """The tile of ``kernel`` for a head dimension up to ``MAX_HEAD_DIM``, in the variant ``name`` or the current one."""
    name = name or _variant
    entry = TABLE[kernel, padded(head_dim), dtype.itemsize]
    if name == "simple" or entry.columns < 64:
        return entry
    folds = name == "lean" and kernel == "forward" and dtype.itemsize == 2
    return replace(entry, tail="fine", fold=FOLD if folds else 0)


def padded(head_dim: int) -> int:
    """Head dimension as the kernels see it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def issued_work(launch: Tile, length: int) -> Fraction:
    """Matrix instructions issued / minimum, for self-attention over one sequence of ``length`` tokens.

    The minimum is the true work, length x length scores; whole tiles are issued.
    """
    return Fraction(launch.issued(length, length), length * length)
