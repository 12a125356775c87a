"""Launch configurations of the Triton attention kernels, all on this page, and the work that each of them issues.

Sequences of a tokenizer are short, so the rows and keys that pad the last tile are a large part of the work. Three
variants deal with them; they differ in the work they issue, never in the result beyond rounding:

* ``simple``: the last tile is a whole one, masked. The default until another is measured to be faster.
* ``tail``: the last keys (in the dK/dV kernel: queries) take a step of 16, of 32, or both, where these suffice.
* ``lean``: ``tail``, and in the forward up to 16 remainder rows are folded into the last main program, which shares
  its keys with them: they cost arithmetic and no traffic.

No entry has been tuned on a GPU; each compiles without spills for the architectures it serves
(``python -m alit_kernels.aot --module alit_kernels.attention.kernels --check``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

KERNELS = ("forward", "backward_queries", "backward_keys")
VARIANTS = ("simple", "tail", "lean")
#: Accumulators of wider heads do not fit the registers of a program.
MAX_HEAD_DIM = 128
#: Remainder rows that the ``lean`` variant folds into the last main program: the rows of one matrix instruction.
FOLD = 16


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        rows: rows of one program: queries, or keys in the dK/dV kernel. The accumulators have as many rows.
        columns: size of one step of its loop: keys, or queries in the dK/dV kernel.
        warps, stages: launch options of Triton.
        tail: which steps are masked. "last": a step of its own after the loop, where there is a remainder. "fine":
            likewise, and up to 48 columns take steps of 32 and 16. "every": all, in one loop; code of half the size,
            for tiles whose operands would be kept in registers through the loop for the sake of the step after it.
        fold: up to this many remainder rows are folded into the last main program.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    tail: str = "last"
    fold: int = 0

    def issued(self, rows: int, columns: int) -> int:
        """Entries of one head's score matrix that the matrix instructions compute."""
        return self._padded_rows(rows) * self._padded_columns(columns)

    def programs(self, rows: int) -> int:
        """Programs that work on a sequence of this many rows."""
        whole, rest = divmod(rows, self.rows)
        return whole + (rest > (self.fold if whole else 0))

    def _padded_rows(self, rows: int) -> int:
        covered = self.programs(rows) * self.rows
        return covered + (self.fold if rows > covered else 0)

    def _padded_columns(self, columns: int) -> int:
        whole, rest = divmod(columns, self.columns)
        fine = self.tail == "fine" and rest <= 48
        return whole * self.columns + (-(-rest // 16) * 16 if fine else self.columns * (rest > 0))


#: (kernel, padded head dimension, bytes per element) -> tile on sm_90 and sm_10x, tile elsewhere.
#: ``python -m alit_kernels.attention.tune`` regenerates it on a GPU.
TABLE = {
    ("forward", 16, 2): (Tile(64, 64, 4, 3),) * 2,
    ("forward", 32, 2): (Tile(64, 64, 4, 3),) * 2,
    ("forward", 64, 2): (Tile(64, 64, 4, 3),) * 2,
    ("forward", 128, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, "every")),
    ("forward", 16, 4): (Tile(32, 64, 8, 2, "every"),) * 2,
    ("forward", 32, 4): (Tile(32, 64, 8, 2, "every"),) * 2,
    ("forward", 64, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("forward", 128, 4): (Tile(32, 64, 8, 1, "every"),) * 2,
    ("backward_queries", 16, 2): (Tile(64, 64, 4, 2),) * 2,
    ("backward_queries", 32, 2): (Tile(64, 64, 4, 2),) * 2,
    ("backward_queries", 64, 2): (Tile(64, 64, 4, 2),) * 2,
    ("backward_queries", 128, 2): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2, "every")),
    ("backward_queries", 16, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_queries", 32, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_queries", 64, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_queries", 128, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_keys", 16, 2): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("backward_keys", 32, 2): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("backward_keys", 64, 2): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("backward_keys", 128, 2): (Tile(64, 32, 4, 3), Tile(64, 64, 8, 2, "every")),
    ("backward_keys", 16, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_keys", 32, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
    ("backward_keys", 64, 4): (Tile(32, 32, 8, 2, "every"), Tile(32, 32, 8, 3, "every")),
    ("backward_keys", 128, 4): (Tile(32, 32, 8, 2, "every"),) * 2,
}
#: Entries that take another tile where their tail is finer or rows are folded in, to fit the registers.
REPLACED = {
    ("forward", 128, 2): (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    ("backward_keys", 128, 2): (Tile(64, 32, 8, 2), Tile(64, 64, 8, 2, "every")),
}
#: Cases that take another tile because the usual one spills there: (kernel, padded head dimension, bytes per element,
#: 80, 90 or 100 for the chip, case) -> tile. The case: dense, masked, and the variant unless it is ``simple``.
EXCEPTIONS: dict[tuple[str, int, int, int, str], Tile] = {
    ("forward", 16, 4, 80, "dense"): Tile(32, 32, 8, 2, "every"),
    ("forward", 32, 2, 100, "dense"): Tile(64, 64, 4, 3, "every"),
    ("forward", 32, 4, 90, "dense masked"): Tile(32, 64, 8, 3, "every"),
    ("forward", 32, 4, 100, "masked"): Tile(32, 64, 8, 3, "every"),
    ("forward", 64, 2, 80, "masked lean"): Tile(32, 64, 4, 3, "fine", 16),
    ("forward", 64, 2, 100, "masked"): Tile(64, 64, 4, 2),
    ("forward", 64, 4, 80, "dense masked"): Tile(32, 32, 8, 3, "every"),
    ("forward", 128, 4, 80, "masked"): Tile(32, 32, 8, 1, "every"),
    ("backward_queries", 32, 2, 80, "masked tail"): Tile(64, 64, 4, 3, "fine"),
    ("backward_queries", 32, 2, 80, "dense masked"): Tile(64, 32, 4, 2),
    ("backward_queries", 128, 4, 80, "masked"): Tile(32, 16, 8, 2, "every"),
    ("backward_queries", 128, 4, 80, "dense masked"): Tile(32, 16, 8, 2, "every"),
    ("backward_keys", 16, 4, 80, "dense masked"): Tile(32, 32, 8, 3, "every"),
    ("backward_keys", 64, 2, 90, "masked tail"): Tile(64, 32, 4, 2, "fine"),
    ("backward_keys", 128, 2, 90, "masked"): Tile(64, 32, 8, 2),
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


def tile(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    architecture: int,
    name: str | None = None,
    *,
    dense: bool = False,
    masked: bool = False,
) -> Tile:
    """The launch configuration of one kernel.

    Args:
        kernel: one of ``KERNELS``.
        head_dim: up to ``MAX_HEAD_DIM``.
        architecture: 10 times the compute capability, 80 for sm_80.
        name: a variant; the current one by default. It changes nothing where every step is masked.
        dense: a dense batch, not packed sequences.
        masked: with a key mask.
    """
    chip = architecture // 10 * 10 if architecture // 10 in (9, 10) else 80
    key = (kernel, padded(head_dim), dtype.itemsize)
    usual = _usual(key, int(chip == 80), name or _variant)
    finer = "lean" if usual.fold else "tail" if usual.tail == "fine" else ""
    case = " ".join(word for word in ("dense" * dense, "masked" * masked, finer) if word)
    return EXCEPTIONS.get((*key, chip, case), usual)


def _usual(key: tuple[str, int, int], side: int, name: str) -> Tile:
    """The entry of the tables, with the tail of the variant."""
    kernel, entry = key[0], TABLE[key][side]
    if name == "simple":
        return entry
    folds = name == "lean" and kernel == "forward"
    if folds or kernel != "forward" or entry.tail == "every":
        entry = REPLACED.get(key, TABLE[key])[side]
    if entry.tail == "every":
        return entry
    return replace(entry, tail="fine", fold=FOLD if folds else 0)


def map_tile(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns, and warps, of one program of the attention map."""
    return (64, 4) if dtype.itemsize == 2 else (32, 8)


def fuses(dtype: torch.dtype) -> bool:
    """Whether the compiler may fuse products with sums. Not in float32, where scale s - lse must round its product as
    the log-sum-exp of the forward did: P of large scores is wrong otherwise.
    """
    return dtype != torch.float32


def padded(head_dim: int) -> int:
    """Head dimension as the kernels see it: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def issued_work(launch: Tile, length: int) -> Fraction:
    """Matrix instructions issued / minimum, for self-attention over one sequence of ``length`` tokens.

    The minimum is the true work, ``length`` x ``length`` scores.
    """
    return Fraction(launch.issued(length, length), length * length)
