"""Scheduler cycles that a call costs a GPU, over all kernels that it launches, counted without a GPU.

A launch is recorded, its kernel compiled and read (``_machine_code``), and some of its programs are run as far as
integers go (``_ptx_machine``), for the iterations of the hot loop and for how much of the other code is reached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from . import _ptx, _ptx_machine
from ._builds import Launch, Recorder

#: Number of a grid's programs that are run, evenly spaced.
SAMPLES = 5


@dataclass(frozen=True)
class Cost:
    """Cost of one launch in scheduler cycles.

    Attributes:
        kernel: its name.
        programs, warps: number of programs in the grid, and of warps in each program.
        turns: iterations of the kernel's own hot loop, per program (a mean); 0 where it has none.
        cycles: scheduler cycles of each unit, over all warps of all programs. On one multiprocessor, which has four
            schedulers, they take a quarter.
    """

    kernel: str
    programs: int
    warps: int
    turns: float
    cycles: dict[str, float]


def launches(call: Callable[[], object], architecture: int) -> list[Launch]:
    """Launches that a call on ``meta`` tensors makes on an architecture (90 for sm_90), recorded."""
    recorder = Recorder("", architecture)
    with recorder("call"):
        call()
    return recorder.launches


def cost(launch: Launch, *, rare: int = 0) -> Cost:
    """Cost of a launch; ``rare``: number of longer branches, which only some data need, that every program takes."""
    build, found = launch.build, launch.build.compiled()
    result, warps = build.read(found), found.metadata.num_warps
    names = [name for name, kind in build.signature.items() if kind != "constexpr"]
    integers = {
        i: int(launch.arguments[name])
        for i, name in enumerate(names)
        if build.signature[name].startswith("i")
    }
    programs = prod(launch.grid)
    chosen = sorted({round(x) for x in np.linspace(0, programs - 1, SAMPLES)})
    blocks = _ptx.parse(found.asm["ptx"])
    places = [np.unravel_index(number, launch.grid[::-1])[::-1] for number in chosen]
    every = [tuple(int(x) for x in place) for place in places]
    _ptx_machine.run(blocks, 32 * warps, integers, every, launch.grid, rare=rare)
    loop = _ptx.hot_loop(blocks)
    within = {id(block) for block in loop}
    rest = [block for block in blocks if id(block) not in within]
    head = loop[0]
    if len(loop) > 1 and head.target and head.target not in {block.label for block in loop}:
        head = loop[1]  # the first block leaves the loop, or goes on with it
    turns, other = head.visits / len(chosen), result.other_cycles
    if not rest:  # no loop: some of the code is reached, once
        rest, turns, other = loop, 0.0, result.hot_loop_cycles
    statements = sum(len(block.statements) for block in rest)
    reached = sum(block.visits * len(block.statements) for block in rest) / len(chosen)
    cycles: dict[str, float] = defaultdict(float)
    for unit, spent in result.hot_loop_cycles.items():
        cycles[unit] += spent * turns / result.unrolled
    for unit, spent in other.items():
        cycles[unit] += spent * reached / max(1, statements)
    total = {unit: spent * programs * warps for unit, spent in cycles.items()}
    return Cost(build.kernel.__name__, programs, warps, turns, total)


def summed(costs: list[Cost]) -> float:
    """Cycles of a call: the sum over launches of the busiest unit's cycles, the time where nothing has to wait."""
    return sum(max(one.cycles.values()) for one in costs)
