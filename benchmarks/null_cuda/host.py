"""Host cost of calls, measured with the null CUDA, a CUDA that does nothing: ``make host``.

Counts of launches, waits and function calls are exact. Host times are CPU times of the process, ours and torch's in
turns; they include no work of a driver or a GPU, so they are not step times.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import driver
from .sources import sources

CHAIN = 40


def forward(link: Callable[[Tensor], Any], x: Tensor, calls: int = CHAIN) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            for _ in range(calls):
                link(x)

    return work


def both(link: Callable[[Tensor], Tensor], x: Tensor, calls: int = CHAIN) -> Callable[[], None]:
    """Function that runs a chain of calls on ``x`` and its backward."""
    x = x.requires_grad_()
    gradient = torch.empty_like(x)

    def work() -> None:
        y = x
        for _ in range(calls):
            y = link(y)
        y.backward(gradient)
        x.grad = None

    return work


def in_turns(works: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Name -> seconds of CPU time in every turn but the first."""
    times: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns + 1):
            for name, work in works.items():
                start = time.process_time()
                work()
                if turn:
                    times[name].append(time.process_time() - start)
            gc.collect(0)
    finally:
        gc.enable()
    return times


def measured(case: Any, turns: int) -> dict[str, Any]:
    """Counts and microseconds of one call, ours and the peer's, for "forward" and "forward and backward"."""
    found: dict[str, Any] = {"peer": case.peer}
    for kind, make in (("forward", forward), ("forward and backward", both)):
        if make is both and not case.learns:
            continue
        links = {"ours": case.ours} | ({"theirs": case.theirs} if case.theirs else {})
        leaves = {name: case.leaf(name == "theirs") for name in links}
        counts = {name: driver.counted(make(link, leaves[name], 1)) for name, link in links.items()}
        works = {name: make(link, leaves[name]) for name, link in links.items()}
        times = in_turns(works, turns)
        micro = {name: [1e6 * s / CHAIN for s in seconds] for name, seconds in times.items()}
        found[kind] = {
            name: counts[name]._asdict()
            | {
                "us": round(statistics.median(micro[name]), 1),
                "least_us": round(min(micro[name]), 1),
            }
            for name in links
        }
        if case.theirs:
            ratios = [a / b for a, b in zip(micro["ours"], micro["theirs"], strict=True)]
            found[kind]["ratio"] = round(statistics.median(ratios), 2)
    return found


def base_step(*others: str) -> dict[str, Callable[[], None]]:
    """Name -> training step of ``base``, batch 12, in bfloat16 autocast: ours, and the other contenders named."""
    from benchmarks.suites.test_stage1_step import Case, contender

    case = Case("base", 12, torch.bfloat16)
    prepared = case.prepared(False)
    return {name: in_autocast(case, contender(name, *prepared)) for name in ("ours", *others)}


def step(turns: int) -> dict[str, Any]:
    works = base_step("eager baseline", "eager baseline, fused attention")
    counts = {name: driver.counted(work, 2) for name, work in works.items()}
    times = in_turns(works, turns)
    return {
        name: counts[name]._asdict()
        | {f"{kind}ms": round(1e3 * of(times[name]), 1) for kind, of in KINDS.items()}
        for name in works
    }


KINDS: dict[str, Callable[[list[float]], float]] = {"": statistics.median, "least_": min}


def in_autocast(case: Any, work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with case.autocast():
            work()

    return run


def show(name: str, rows: dict[str, Any], unit: str) -> None:
    for contender, row in rows.items():
        if contender != "ratio":
            calls = f"functions {row['python']} + {row['c']}"
            print(
                f"{name:58} {contender:32} {row[unit]:8.1f} {unit}, least {row[f'least_{unit}']:8.1f};"
                f" launches {row['launches']}, waits {row['waits']}, {calls}"
            )
    if "ratio" in rows:
        print(f"{'':58} ratio {rows['ratio']}", flush=True)


def main() -> None:
    name = "python -m benchmarks.null_cuda.host"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--core", type=Path, help="alit_kernels._C for the null CUDA")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    driver.prepare(options.core)
    # The project may be imported only after its core has been loaded (driver.prepare).
    from ..harness.timing import machine, write_json
    from .cases import cases

    calls = {}
    for case in cases():
        if options.only in case.name:
            calls[case.name] = found = measured(case, options.turns)
            for kind in ("forward", "forward and backward"):
                show(f"{case.name}, {kind}", found.get(kind, {}), "us")
    steps = step(max(3, options.turns // 3)) if options.only in "step of base" else {}
    show("step of base", steps, "ms")
    if missing := driver.unknown():
        raise SystemExit(f"the null CUDA has no body for {', '.join(missing)}, which was called")
    if options.json:
        about = {
            "command": "make host",
            "machine": machine(),
            "triton": metadata.version("triton"),
            "sources": sources(),
        }
        write_json(options.json, about | {"calls": calls, "step": steps})


if __name__ == "__main__":
    main()
