"""What threads and instruction sets give the codebook ops on a CPU: ``python -m benchmarks.studies.instruction_sets``.

The suites' contests of search and of a quantizer's training step, with two threads and with one; of the search ours
with each instruction set. Rates count 2 N K D floating-point operations. Everything is verified before it is timed and
runs in turns; the file holds medians.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from alit_kernels import nearest_codeword
from alit_kernels._cpp import INSTRUCTION_SET_VARIABLE, INSTRUCTION_SETS, core
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import Contest
from ..harness.timing import write
from ..suites import test_nearest_codeword, test_vector_quantize

#: Those with a search of their own, the best first.
SEARCHES = ("avx512", "avx2", "baseline")


def ours(z: Tensor, codebook: Tensor, instruction_set: str) -> Tensor:
    os.environ[INSTRUCTION_SET_VARIABLE] = instruction_set
    try:
        return nearest_codeword(z, codebook, implementation="cpp")
    finally:
        del os.environ[INSTRUCTION_SET_VARIABLE]


def measured(case: Case, race: Contest, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds, rates and memory of the named contenders, but for those that are absent."""
    race.prepare = {name: race.prepare[name] for name in names}
    result: dict[str, Any] = {
        "shape": f"{case.vectors} x {case.codes} x {case.dim}",
        "threads": torch.get_num_threads(),
    }
    for name, seconds in race.medians(rounds).items():
        result[f"{name} ms"] = round(1e3 * seconds, 2)
        result[f"{name} GFLOP/s"] = round(race.work.flops / seconds / 1e9)
        result[f"{name} MB"] = round(race.peak_megabytes(name), 1)
    return result


def search(case: Case, rounds: int) -> dict[str, Any]:
    z, codebook, _ = make(case)
    order = INSTRUCTION_SETS.index
    best = order(core().build_info()["instruction_set"])
    sets = tuple(name for name in SEARCHES if order(name) <= best)
    race = test_nearest_codeword.contest(case)  # of the same numbers
    own = {name: lambda name=name: partial(ours, z, codebook, name) for name in sets}
    race.prepare = {**race.prepare, **own}
    return measured(case, race, (*sets, "eager", "faiss"), rounds)


def step(case: Case, rounds: int) -> dict[str, Any]:
    names = ("ours", "eager, one-hot", "eager, gather")
    return measured(case, test_vector_quantize.contest(case), names, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results: dict[str, list[dict[str, Any]]] = {"search": [], "step": []}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results["search"] += [search(case, rounds) for case in BENCHMARK_CASES]
        results["step"].append(step(test_vector_quantize.STEP, rounds))
    for title, rows in results.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(width=220).print(table)
    print(write("instruction_sets", results))


if __name__ == "__main__":
    main()
