"""Check exact counts of launches, waits and function calls of every op and module and of a training step of ``base``.

``python -m benchmarks.null_cuda.counts --core FILE`` fails if a count exceeds that in ``counts.json``; ``--write``
writes that file. Counts of function calls hold for one Python and one torch: with other versions only launches and
waits are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import driver
from .driver import Counts
from .host import base_step, both, forward

FILE = Path(__file__).with_name("counts.json")
WRITE = "python -m benchmarks.null_cuda.counts --write"
Table = dict[str, Counts]


def counts() -> Iterator[tuple[str, Counts]]:
    """(name, counts) of every case, for a call and for a call with its backward, and of a training step of ``base``."""
    # The project may be imported only after its core has been loaded (driver.prepare).
    from .cases import cases

    for case in cases():
        yield f"{case.name}, forward", driver.counted(forward(case.ours, case.leaf(), 1))
        if case.learns:
            yield (
                f"{case.name}, forward and backward",
                driver.counted(both(case.ours, case.leaf(), 1)),
            )
    yield "step of base", driver.counted(base_step()["ours"], 2)


def versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__.partition("+")[0]}


def compared(found: Table, held: Table, kinds: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Lines on counts above and on counts below ``held``; a case that only one table has is among the former."""
    more = [f"{name}: not held" for name in found.keys() - held.keys()]
    more += [f"{name}: held, but no longer counted" for name in held.keys() - found.keys()]
    less = []
    for name in [name for name in found if name in held]:
        pairs = [(kind, getattr(held[name], kind), getattr(found[name], kind)) for kind in kinds]
        for table, wanted in (
            (more, [x for x in pairs if x[2] > x[1]]),
            (less, [x for x in pairs if x[2] < x[1]]),
        ):
            if wanted:
                changes = ", ".join(f"{kind} {before} -> {after}" for kind, before, after in wanted)
                table.append(f"{name}: {changes}")
    return sorted(more), sorted(less)


def read(path: Path) -> tuple[dict[str, str], Table]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content["versions"], {name: Counts(**row) for name, row in content["counts"].items()}


def write(path: Path, found: Table) -> None:
    rows = ",\n".join(f'  "{name}": {json.dumps(row._asdict())}' for name, row in found.items())
    head = json.dumps(versions())
    path.write_text(f'{{\n "versions": {head},\n "counts": {{\n{rows}\n }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.null_cuda.counts", description=__doc__
    )
    parser.add_argument("--core", type=Path, help="alit_kernels._C for the null CUDA")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    driver.prepare(options.core)
    found = dict(counts())
    if options.write:
        write(FILE, found)
        return
    of, held = read(FILE)
    if of == versions():
        kinds = Counts._fields
    else:
        kinds = ("launches", "waits")
        print(f"functions are not compared: {FILE.name} is of {of}, this is {versions()}")
    more, less = compared(found, held, kinds)
    if less:
        print("\n".join(less), f"better, rewrite with '{WRITE}'", sep="\n")
    if more:
        raise SystemExit("\n".join([*more, f"more than {FILE.name} has; if it must be: '{WRITE}'"]))
    print(f"{len(found)} cases, no more than {FILE.name} has: {', '.join(kinds)}")


if __name__ == "__main__":
    main()
