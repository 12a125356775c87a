"""``python -m alit_kernels.attention``: work issued / minimum by length and tile, as the Markdown table of the docs.

``--machine-code``: instructions of one step of the main loop instead, by kernel and chip, compiled ahead of time.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch

from .configurations import KERNELS, Tile, issued_work, tile

LENGTHS = range(289, 514, 32)


def tiles() -> dict[str, Tile]:
    """Tiles by label: square ones as other kernels have them, then every shape that ours take in half precision."""
    found = {f"{size} x {size}": Tile(size, size, 4, 2) for size in (192, 128, 64)}
    for kernel, width, architecture in itertools.product(KERNELS, (64, 128), (80, 90)):
        launch = tile(kernel, width, torch.bfloat16, architecture)
        found.setdefault(f"{launch.rows} x {launch.columns}", launch)
    return found


def table() -> str:
    """Markdown table of work issued / minimum: one row per tile shape, with every length, then the geometric mean."""
    head = ["rows x columns", *map(str, LENGTHS), "mean"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for label, launch in tiles().items():
        work = [float(issued_work(launch, length)) for length in LENGTHS]
        mean = math.prod(work) ** (1 / len(work))
        rows.append([label, *(f"{w:.3f}" for w in work), f"{mean:.3f}"])
    return _markdown(rows)


def machine_code() -> str:
    """Markdown table of a warp's instructions in one iteration of the main loop: packed, no mask, bfloat16."""
    from .. import _machine_code as machine
    from .._builds import Recorder
    from .builds import record_entry

    rows = [["kernel", "chip", "step", "all", "matrix", "exponentials", "other"]]
    rows.append(["---"] * 3 + ["---:"] * 4)
    for head_dim, kernel, architecture in itertools.product((64, 128), KERNELS, (80, 90, 100)):
        recorder = Recorder(__package__, architecture)
        record_entry(recorder, head_dim, torch.bfloat16)
        (build,) = (
            b
            for b in recorder.builds.values()
            if b.kernel.__name__ == f"{kernel}_kernel" and not b.rare
        )
        _, _, listing = machine.disassemble(build.compiled().asm["cubin"])
        loop = machine.hot_loop(machine.instructions(listing))
        count = machine.counts(loop)
        matrix, exponentials = (
            sum(count.get(name, 0) for name in names) for names in (machine.MATRIX, ("exp2",))
        )
        name, sizes = kernel.replace("_", " "), build.sizes
        rows.append([f"{name}, D = {head_dim}", f"sm_{architecture}"])
        rows[-1].append(f"{sizes['TILE']} x {sizes['STEP']}")
        numbers = (len(loop), matrix, exponentials, len(loop) - matrix - exponentials)
        rows[-1] += map(str, numbers)
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alit_kernels.attention", description=__doc__)
    parser.add_argument("--machine-code", action="store_true")
    print(machine_code() if parser.parse_args().machine_code else table())
