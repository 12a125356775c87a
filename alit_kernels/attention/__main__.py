"""``python -m alit_kernels.attention``: work issued / minimum by length and tile, as the Markdown table of the docs.

``--machine-code``: instructions of one step of the main loop instead, by kernel and chip, compiled ahead of time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re

import torch

from .configurations import KERNELS, Tile, issued_work, tile

LENGTHS = range(289, 514, 32)


def tiles() -> dict[str, Tile]:
    """Whole tiles as other kernels have them, then every shape that ours take in half precision."""
    found = {f"{size} x {size}": Tile(size, size, 4, 2) for size in (192, 128, 64)}
    for kernel, width, architecture in itertools.product(KERNELS, (64, 128), (80, 90)):
        launch = tile(kernel, width, torch.bfloat16, architecture)
        found.setdefault(f"{launch.rows} x {launch.columns}", launch)
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


def machine_code() -> str:
    """Instructions of a warp in one turn of the main loop: packed, no mask, bfloat16."""
    from .. import _machine_code as machine
    from ..aot import compiled, disassemble
    from .kernels import builds

    rows = [["kernel", "chip", "step", "all", "matrix", "exponentials", "other"]]
    rows.append(["---"] * 3 + ["---:"] * 4)
    plain = re.compile(r"d=(64|128) bf16 M(\d+) N(\d+)")
    for build in builds():
        found = plain.fullmatch(build.label) if "TILE" in build.constants else None
        for architecture in build.architectures if found else ():
            _, _, listing = disassemble(compiled(build, architecture).asm["cubin"])
            loop = machine.hot_loop(machine.instructions(listing))
            count = machine.counts(loop)
            matrix = sum(count.get(name, 0) for name in ("mma", "wgmma", "tcgen05"))
            exponentials = count.get("exp2", 0)
            assert found
            name = build.kernel.__name__.removesuffix("_kernel").replace("_", " ")
            rows.append(
                [f"{name}, D = {found[1]}", f"sm_{architecture}", f"{found[2]} x {found[3]}"]
            )
            numbers = (len(loop), matrix, exponentials, len(loop) - matrix - exponentials)
            rows[-1] += map(str, numbers)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alit_kernels.attention", description=__doc__)
    parser.add_argument("--machine-code", action="store_true")
    print(machine_code() if parser.parse_args().machine_code else table())
