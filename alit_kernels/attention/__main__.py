"""``python -m alit_kernels.attention``: work issued / minimum by length and tile, as the Markdown table of the docs."""

from __future__ import annotations

import itertools
import math

import torch

from .configurations import KERNELS, VARIANTS, Tile, issued_work, tile

LENGTHS = range(289, 514, 32)


def tiles() -> dict[str, Tile]:
    """Whole tiles as other kernels have them, then every shape that ours take in half precision."""
    found = {f"{size} x {size}": Tile(size, size, 4, 2) for size in (192, 128, 64)}
    for name, kernel, width, architecture in itertools.product(
        VARIANTS, KERNELS, (64, 128), (80, 90)
    ):
        launch = tile(kernel, width, torch.bfloat16, architecture, name)
        fine = ", fine tail" * (launch.tail == "fine") + ", rows folded" * (launch.fold > 0)
        found.setdefault(f"{launch.rows} x {launch.columns}{fine}", launch)
    return found


def table() -> str:
    """One row per shape: every length, then the geometric mean."""
    head = ["rows x columns", *map(str, LENGTHS), "mean"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for label, launch in tiles().items():
        work = [float(issued_work(launch, length)) for length in LENGTHS]
        mean = math.prod(work) ** (1 / len(work))
        rows.append([label, *(f"{w:.3f}" for w in work), f"{mean:.3f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
