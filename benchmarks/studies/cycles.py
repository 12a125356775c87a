"""GPU cycles of calls, counted from machine code without a GPU: ``python -m benchmarks.studies.cycles``.

The cost of a call is the sum over its launches of the cycles of the busiest unit (``alit_kernels._launch_cycles``), per
unit of the kernel's work. Nothing is timed: waits for memory or for other kernels are not counted.
``--compare FILE`` fails if a call costs over 2 % more than in a result of the same Triton.

The extra work of a search for single rows depends on the data. The rows that need it are counted on the benchmark's
data, by a search in Triton's interpreter, which takes some minutes; ``--compare`` takes the counts from its file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alit_kernels import _launch_cycles
from alit_kernels.attention.problem import Problem
from alit_kernels.attention.triton_ import attention, attention_backward
from alit_kernels.nearest_codeword import triton_
from alit_kernels.nearest_codeword.triton_ import search
from alit_kernels.soft_codebook.triton_ import soft_codebook, soft_codebook_backward
from alit_kernels.vector_quantize.cases import Case, make

from ..harness.timing import write

#: Largest ratio of a call's cycles to those of the compared result.
WORSE = 1.02
SEARCHES = (Case(8192, 4096, 12), Case(8192, 1024, 256))


@dataclass(frozen=True)
class Call:
    """A call whose cycles are counted.

    Attributes:
        unit: unit of work that the cycles are given per; ``units``: number of units in the call.
        schedulers: cycles are given for one scheduler (1) or for a multiprocessor (4).
        case: case of a search; ``doubt``: share of its rows that are scanned, None for that of the benchmark's data.
    """

    call: Callable[[], object]
    unit: str
    units: float
    schedulers: int = 4
    case: Case | None = None
    doubt: float | None = None


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


def search_calls(case: Case) -> dict[str, Call]:
    """Name -> search of a case: with the benchmark's share of rows in doubt, and with 5 % of them."""
    z, codebook = empty(case.vectors, case.dim), empty(case.codes, case.dim)
    pairs = case.vectors * case.codes
    unit, units, schedulers = "pair", pairs, 1
    if case.dim > 16:
        unit, units, schedulers = "64 x 64 pairs", pairs // 64**2, 4
    name = f"nearest_codeword {case.vectors} x {case.codes} x {case.dim}"
    return {
        name + also: Call(
            lambda: search(z, codebook, "euclidean", "ieee"), unit, units, schedulers, case, doubt
        )
        for also, doubt in (("", None), (", 5 % in doubt", 0.05))
    }


def calls() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            found |= attention_calls(dtype, head_dim)
    for case in SEARCHES:
        found |= search_calls(case)
    logits, codebook, target = empty(2048, 4096), empty(4096, 256), empty(2048, dtype=torch.int64)
    unit, units = "64 x 64 logits", 2048 * 4096 / 64**2
    code, nll, normalizer = empty(2048, 256), empty(2048), empty(2, 2048)
    found["soft_codebook forward 2048 x 4096 x 256"] = Call(
        lambda: soft_codebook(logits, codebook, target), unit, units
    )
    found["soft_codebook backward 2048 x 4096 x 256"] = Call(
        lambda: soft_codebook_backward(
            code, nll, nll, logits, codebook, target, code, normalizer, True, True
        ),
        unit,
        units,
    )
    return found


@dataclass(frozen=True)
class Rows:
    """Numbers of rows of a search that need more work than a comparison of their scores.

    Attributes:
        two: rows with two codes within the limit, which are compared in float32.
        many: rows with codes that are compared in float64; ``kept``: number of these codes in all rows.
        doubt: rows that are scanned, in ``cells`` cells in all, by ``blocks`` programs for each part of the codebook.
    """

    two: float
    many: float
    kept: float
    doubt: float
    cells: float
    blocks: float

    def with_doubt(self, share: float, rows: int) -> Rows:
        """Numbers for this share of ``rows`` scanned, at random positions, each in as many cells as here."""
        more = share * rows - self.doubt
        return Rows(
            self.two,
            self.many + more,
            self.kept + 2 * more,
            share * rows,
            share * rows * self.cells / max(1, self.doubt),
            (1 - (1 - share) ** 32) * rows / 32,
        )


def rows_of(case: Case) -> Rows:
    """Numbers of rows of a case with the benchmark's data; run in Triton's interpreter."""
    (z, codebook, _), index = make(case), torch.empty(case.vectors, dtype=torch.int64)
    products = 3 if case.dim <= triton_.THREE else 1
    found = triton_.prepare(z, codebook, cosine=False, products=products)
    proposed = triton_.propose(found, None, products)
    scanned = triton_.settle(found, None, proposed, index, products, exact=True)
    assert scanned is not None
    least = proposed.score.amin(0)
    limit = least + 2.02 * triton_.error_bounds(found, proposed, products).sum(0)
    within = proposed.score <= limit
    kept, doubt = within.sum(0), scanned > -torch.inf
    two = (kept == 2) & ~doubt
    codes = proposed.code[:, two].T[within[:, two].T].view(-1, 2)
    near, far = (z[two, None] - codebook[codes]).square().sum(-1).sort(1).values.T
    many = doubt | (kept > 2)
    many[two] |= far <= near * (1 + (case.dim + 8) * 2.0**-23)
    return Rows(
        int(two.sum()),
        int(many.sum()),
        int(kept[many].sum()),
        int(doubt.sum()),
        int(((proposed.others <= limit) & doubt).sum()),
        int(doubt.view(-1, 32).any(1).sum()),
    )


def counted(call: Call, architecture: int, rows: Rows | None) -> dict[str, Any]:
    launches = _launch_cycles.launches(call.call, architecture)
    costs = [_launch_cycles.cost(launch) for launch in launches]
    if rows is not None and call.case is not None:
        if call.doubt is not None:
            rows = rows.with_doubt(call.doubt, call.case.vectors)
        # Rare branches of a program, in this order. settle_kernel: a row with two codes, a row with more, each of its
        # codes. scan_kernel: rows in doubt, one row, its known state, a cell, codes that are close, the merge.
        taken = {
            "settle_kernel": (rows.two, rows.many, rows.kept),
            "scan_kernel": (
                rows.blocks * costs[3].programs / costs[2].programs,
                *(rows.cells,) * 4,
                rows.blocks,
            ),
        }
        for i, numbers in enumerate(taken.get(one.kernel, ()) for one in costs):
            before = costs[i].cycles.copy()
            for ways, number in enumerate(numbers, 1):
                more = _launch_cycles.cost(launches[i], rare=ways)
                for unit, spent in more.cycles.items():
                    share = number / more.programs
                    costs[i].cycles[unit] += share * (spent - before[unit])
                before = more.cycles
    share = call.schedulers * call.units
    return {
        "unit": f"cycles of a {'scheduler' if call.schedulers == 1 else 'multiprocessor'} for {call.unit}",
        "all": round(_launch_cycles.summed(costs) / share, 3),
        "rows": rows and asdict(rows),
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


def rows_in_interpreter() -> dict[str, Any]:
    """Case -> :class:`Rows` as a dict, of ``SEARCHES``, counted by this module in a process with the interpreter."""
    command = [sys.executable, "-m", "benchmarks.studies.cycles", "--rows"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return json.loads(subprocess.run(command, env=environment, stdout=-1, check=True).stdout)


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--compare", type=Path)
    parser.add_argument(
        "--only", default="", help="calls in whose name this regular expression is found"
    )
    parser.add_argument("--rows", action="store_true", help="print the rows of searches alone")
    options = parser.parse_args()
    if options.rows:
        print(json.dumps({str(tuple(case)): asdict(rows_of(case)) for case in SEARCHES}))
        return 0
    known = json.loads(options.compare.read_text())["results"] if options.compare else {}
    rows = known["rows"] if known else rows_in_interpreter()
    found = {
        name: counted(
            call, options.arch, Rows(**rows[str(tuple(call.case))]) if call.case else None
        )
        for name, call in calls().items()
        if re.search(options.only, name)
    }
    if not known:
        about = {"triton": triton.__version__, "arch": options.arch, "rows": rows}
        write("cycles", about | {"calls": found})
        return 0
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
