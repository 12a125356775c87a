"""What calls cost a GPU, counted from machine code without one: ``python -m benchmarks.studies.cycles``.

Of every launch of a call the cycles of its busiest unit (``alit_kernels._launch_cycles``), summed, in the unit in which
the kernel does its work. Nothing is timed: what waits for memory or for another kernel is not counted.
``--compare FILE`` fails where a call costs more than 2 % more than in a result of the same Triton.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alit_kernels import _launch_cycles
from alit_kernels.attention.problem import Problem
from alit_kernels.attention.triton_ import attention, attention_backward
from alit_kernels.nearest_codeword.triton_ import search
from alit_kernels.soft_codebook.triton_ import soft_codebook, soft_codebook_backward

from ..harness.timing import write

#: Of the result, at most.
WORSE = 1.02


@dataclass(frozen=True)
class Call:
    """What is counted.

    Attributes:
        unit: what the cycles are given for, and ``units``: how many of them the call has.
        schedulers: whose cycles: of one scheduler (1), or of a multiprocessor (4).
        rows, share: of a search: its rows, and how many of them are scanned.
    """

    call: Callable[[], object]
    unit: str
    units: float
    schedulers: int = 4
    rows: int = 0
    share: float = 0.0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_calls(dtype: torch.dtype, head_dim: int) -> dict[str, Call]:
    q = empty(4, 1024, 8, head_dim, dtype=dtype)
    problem = Problem(q, q, q, None, None, 1024, 1024, None, None, head_dim**-0.5)
    lse = empty(4, 8, 1024)
    name = f"{str(dtype).removeprefix('torch.')} d={head_dim}"
    unit, units = "64 x 32 scores", 4 * 8 * 1024 * 1024 / (64 * 32)
    return {
        f"attention forward {name}": Call(lambda: attention(problem), unit, units),
        f"attention backward {name}": Call(
            lambda: attention_backward(problem, q, None, q, lse, True), unit, units
        ),
    }


def search_calls(rows: int, codes: int, dim: int) -> dict[str, Call]:
    """With none of the rows scanned, the share that was in doubt on the benchmark's data, and 5 %."""
    z, codebook = empty(rows, dim), empty(codes, dim)
    unit, units, schedulers = "pair", rows * codes, 1
    if dim > 16:
        unit, units, schedulers = "64 x 64 pairs", rows * codes // 64**2, 4
    return {
        f"nearest_codeword {rows} x {codes} x {dim}, {100 * share:g} % scanned": Call(
            lambda: search(z, codebook, "euclidean", "ieee"), unit, units, schedulers, rows, share
        )
        for share in (0.0, 0.0165, 0.05)
    }


def calls() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            found |= attention_calls(dtype, head_dim)
    for sizes in ((8192, 4096, 12), (8192, 1024, 256)):
        found |= search_calls(*sizes)
    logits, codebook, target = empty(2048, 4096), empty(4096, 256), empty(2048, dtype=torch.int64)
    unit, units = "64 x 64 logits", 2048 * 4096 / 64**2
    code, nll, normaliser = empty(2048, 256), empty(2048), empty(2, 2048)
    found["soft_codebook forward 2048 x 4096 x 256"] = Call(
        lambda: soft_codebook(logits, codebook, target), unit, units
    )
    found["soft_codebook backward 2048 x 4096 x 256"] = Call(
        lambda: soft_codebook_backward(
            code, nll, nll, logits, codebook, target, code, normaliser, True, True
        ),
        unit,
        units,
    )
    return found


def scans(rows: int, share: float) -> float:
    """How many of its programs (of 64 rows) scan four rows, on average, where ``share`` of all rows are scanned."""
    found = [math.comb(64, n) * share**n * (1 - share) ** (64 - n) for n in range(65)]
    return sum(chance * -(-n // 4) for n, chance in enumerate(found)) * rows / 64


def counted(call: Call, architecture: int) -> dict[str, Any]:
    costs = _launch_cycles.of(call.call, architecture)
    if call.share:
        rare = _launch_cycles.of(call.call, architecture, rare=True)
        every = scans(call.rows, call.share) / (call.rows / 64)
        for one, more in zip(costs, rare, strict=True):
            for unit, spent in more.cycles.items():
                one.cycles[unit] += every * (spent - one.cycles[unit])
    share = call.schedulers * call.units
    return {
        "unit": f"cycles of a {'scheduler' if call.schedulers == 1 else 'multiprocessor'} for {call.unit}",
        "all": round(_launch_cycles.summed(costs) / share, 3),
        "launches": [
            {
                "kernel": one.kernel,
                "programs": one.programs,
                "warps": one.warps,
                "turns": round(one.turns, 2),
                "cycles": {unit: round(spent / share, 3) for unit, spent in one.cycles.items()},
            }
            for one in costs
        ],
    }


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", default="", help="of calls whose name has this in it")
    options = parser.parse_args()
    chosen = {name: call for name, call in calls().items() if options.only in name}
    found = {name: counted(call, options.arch) for name, call in chosen.items()}
    if options.compare is None:
        write("cycles", {"triton": triton.__version__, "arch": options.arch, "calls": found})
        return 0
    known = json.loads(options.compare.read_text())["results"]
    if known["triton"] != triton.__version__:
        raise SystemExit(
            f"{options.compare} is of Triton {known['triton']}, not {triton.__version__}"
        )
    worse = []
    for name, one in found.items():
        before = known["calls"].get(name, {"all": 0})["all"]
        print(f"{name}: {one['all']:g} {one['unit']}, before {before:g}")
        if one["all"] > WORSE * before:
            worse.append(name)
    if worse:
        print(f"more cycles than in {options.compare}: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
