"""Run the suite at full length with one worker and with four, then in twenty more orders without the tests marked
``apart``: ``make test-full``.

Each finished run is a line of tests/full-run.jsonl. If interrupted, the next call does the runs missing for the commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.harness.timing import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "full-run.jsonl"
FULL_LENGTH = {"ALIT_FUZZ_EXAMPLES": "20000", "ALIT_KILLS": "40"}
#: Seed of the order, number of workers (0: without xdist), and variables that make the tests long.
RUNS: list[tuple[int, int, dict[str, str]]] = [
    (1, 0, FULL_LENGTH),
    (2, 4, FULL_LENGTH),
    *((seed, 2, {}) for seed in range(3, 23)),
]


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def run(seed: int, workers: int, lengths: dict[str, str]) -> dict[str, Any]:
    """Run the suite once; returns counts of tests by outcome, seconds, and the names of those that failed."""
    chosen = [] if lengths else ["-m", "not apart"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "worksteal"]
        command += [f"--randomly-seed={seed}", f"--junitxml={report}", *chosen]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | lengths, check=False)
        if done.returncode not in (0, 1):  # stopped, or not started: no run to write down
            raise SystemExit(done.returncode)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if {child.tag for child in case} & {"failure", "error"}
    ]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
    return counts | {"seconds": round(float(suite.attrib["time"])), "failed": failed}


def main() -> None:
    if git("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}"):
        raise SystemExit("full_run: commit first: the commit is written down beside the results")
    commit = git("rev-parse", "HEAD")
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = [x for x in map(json.loads, lines) if x["commit"] == commit]
    RESULTS.write_text("".join(json.dumps(x) + "\n" for x in results))
    for seed, workers, lengths in RUNS:
        if seed in [x["seed"] for x in results]:
            continue
        about = {"commit": commit, "machine": machine(), "seed": seed, "workers": workers}
        results.append(about | lengths | run(seed, workers, lengths))
        with RESULTS.open("a") as file:
            print(json.dumps(results[-1]), file=file)
    if any(x["failed"] for x in results):
        raise SystemExit(f"full_run: tests failed, see {RESULTS}")


if __name__ == "__main__":
    main()
