"""What a call costs the host, measured over a CUDA that does nothing: ``make host``.

Launches, waits and calls of functions are exact. Host times are CPU time of the process, ours and torch's own in turns; a
driver's own work, 1.3 to 3 us a launch, is not in them, nor is any work of a GPU: there is no step time here.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import driver

ROOT = Path(__file__).resolve().parents[2]
CHAIN = 40


def forward(link: Callable[[Tensor], Any], x: Tensor, calls: int = CHAIN) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            for _ in range(calls):
                link(x)

    return work


def both(link: Callable[[Tensor], Tensor], x: Tensor, calls: int = CHAIN) -> Callable[[], None]:
    """A chain of calls and its backward."""
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
    """Seconds of CPU time of each in every turn; the first turn is not counted."""
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
    """Counts of one call and microseconds of one call."""
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


def sources() -> str:
    """A hash of what the numbers depend on."""
    files = [p for name in ("alit_kernels", "csrc") for p in sorted((ROOT / name).rglob("*"))]
    files = [p for p in files if p.suffix in (".py", ".h", ".cpp", ".cu", ".c")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.null_cuda.host", description=__doc__
    )
    parser.add_argument(
        "--core", type=Path, help="alit_kernels._C, linked to the dynamic CUDA runtime"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    driver.prepare(options.core)
    from .cases import cases

    found = {}
    for case in cases():
        if options.only not in case.name:
            continue
        found[case.name] = result = measured(case, options.turns)
        for kind in ("forward", "forward and backward"):
            for name, row in result.get(kind, {}).items():
                if name != "ratio":
                    print(
                        f"{case.name:34} {kind:21} {name if name == 'ours' else case.peer:24} {row['us']:8.1f} us, least {row['least_us']:8.1f};"
                        f" launches {row['launches']}, waits {row['waits']}, functions {row['python']} + {row['c']}",
                        flush=True,
                    )
            if "ratio" in result.get(kind, {}):
                print(f"{'':34} {'':21} ratio {result[kind]['ratio']}", flush=True)
    if missing := driver.unknown():
        raise SystemExit(f"the null CUDA has no body for {', '.join(missing)}, which was called")
    if options.json:
        head = {
            "date": date.today().isoformat(),
            "machine": platform.processor(),
            "torch": torch.__version__,
            "sources": sources(),
        }
        options.json.write_text(json.dumps(head | {"calls": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
