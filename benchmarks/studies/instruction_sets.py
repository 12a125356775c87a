"""Codebook ops by threads and instruction sets of a CPU: ``python -m benchmarks.studies.instruction_sets``.

The suites' contests of search and of a quantizer's training step, with two threads and with one; of the search ours
with each instruction set. Rates count 2 N K D floating-point operations. Everything is verified before it is timed and
runs in turns; the file holds medians.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alit_kernels import nearest_codeword
from alit_kernels._cpp import INSTRUCTION_SET_VARIABLE, INSTRUCTION_SETS, core
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import Contest
from ..harness.timing import rounds, write
from ..suites import test_codebooks as codebooks

#: Instruction sets with a search kernel of their own, the best first.
SEARCHES = ("avx512", "avx2", "baseline")


def ours(z: Tensor, codebook: Tensor, instruction_set: str) -> Tensor:
    os.environ[INSTRUCTION_SET_VARIABLE] = instruction_set
    try:
        return nearest_codeword(z, codebook, implementation="cpp")
    finally:
        del os.environ[INSTRUCTION_SET_VARIABLE]


def measured(case: Case, race: Contest, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds, rates and memory of the named contenders that are not absent."""
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
    race = codebooks.search(case)  # of the same numbers
    own = {name: lambda name=name: partial(ours, z, codebook, name) for name in sets}
    race.prepare = {**race.prepare, **own}
    return measured(case, race, (*sets, "eager", "faiss"), rounds)


def step(case: Case, rounds: int) -> dict[str, Any]:
    names = ("ours", "eager, one-hot", "eager, gather")
    return measured(case, codebooks.quantizer(case), names, rounds)


if __name__ == "__main__":
    count = rounds(__doc__, default=7)
    results: dict[str, list[dict[str, Any]]] = {"search": [], "step": []}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results["search"] += [search(case, count) for case in BENCHMARK_CASES]
        results["step"].append(step(codebooks.STEP, count))
    write("instruction_sets", results)
