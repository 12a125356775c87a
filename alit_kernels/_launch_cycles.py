"""What a call costs a GPU in scheduler cycles, counted without one: of all kernels that it launches.

A launch is recorded, its kernel compiled and read (``_machine_code``), and some of its programs are run as far as
integers go (``_ptx_machine``), for the turns of the hot loop and for which of the other code is reached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from . import _ptx, _ptx_machine
from ._builds import Launch, Recorder

#: How many of a grid's programs are run, evenly spaced.
SAMPLES = 5


@dataclass(frozen=True)
class Cost:
    """Of one launch.

    Attributes:
        kernel: its name.
        programs, warps: of the grid, and of each program.
        turns: of the kernel's own hot loop, per program (a mean); 0 where it has none.
        cycles: scheduler cycles of each unit, of all warps of all programs. Of one multiprocessor, which has four
            schedulers, a quarter.
    """

    kernel: str
    programs: int
    warps: int
    turns: float
    cycles: dict[str, float]


def launches(call: Callable[[], object], architecture: int) -> list[Launch]:
    """What a call on ``meta`` tensors launches."""
    recorder = Recorder("", architecture)
    with recorder("call"):
        call()
    return recorder.launches


def cost(launch: Launch, *, rare: int = 0) -> Cost:
    """Of a launch; with ``rare`` every program takes so many longer ways that only some data need."""
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
        head = loop[1]  # the first leaves the loop, or goes on with it
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
    """Of a call: of each launch the busiest unit's cycles, which is what it takes where nothing has to wait."""
    return sum(max(one.cycles.values()) for one in costs)
