"""Result files of ``pytest benchmarks --benchmark-json``, read for the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from alit.atomic_files import replacing

#: Percent of the processors that other processes may use before the report says so, or leaves a breakdown out.
BUSY = 5.0
#: A breakdown is left out too where its step took so many times as long as the slowest timed one.
SLOWER = 1.25


class Row(NamedTuple):
    """One contender of one group: median and spread in seconds, and what the contest noted."""

    group: str
    contender: str
    median: float
    low: float
    high: float
    info: dict[str, Any]

    @property
    def parts(self) -> dict[str, float] | None:
        """Seconds of a training step by part, if it was measured while the machine was ours."""
        load, parts = self.info.get("parts_other_load_percent", 100.0), self.info.get("parts")
        disturbed = load is not None and load > BUSY
        if disturbed or parts is None or sum(parts.values()) > SLOWER * self.high:
            return None
        return parts


class Run(NamedTuple):
    """One result file."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]
    left_out: dict[str, dict[str, str]] = {}  # noqa: RUF012 (immutable): case -> contender -> why

    @property
    def groups(self) -> dict[str, list[Row]]:
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return grouped


def files(path: Path) -> list[Path]:
    """The result files of a run: its parts where it is a folder."""
    return sorted(path.glob("test_*.json")) if path.is_dir() else [path]


def compact(path: Path) -> None:
    """Write a JSON file anew in one line: half the bytes of what pytest-benchmark indents, and the same content."""
    text = path.read_text()
    short = json.dumps(json.loads(text), separators=(",", ":")) + "\n"
    if short != text:
        with replacing(path) as file:
            file.write_text(short)


def read(path: Path) -> Run:
    """A file of pytest-benchmark, or a folder whose ``test_*.json`` are the parts of one run.

    Raises:
        ValueError: it is no such file, or not one of this suite.
    """
    if path.is_dir():
        return merged(path.name, map(read, files(path)))
    content = json.loads(path.read_text())
    if "benchmarks" not in content or "alit" not in content.get("machine_info", {}):
        raise ValueError(f"{path}: expected a result of 'pytest benchmarks --benchmark-json'")
    rows = [
        Row(
            entry["group"],
            entry["extra_info"]["contender"],
            *(entry["stats"][name] for name in ("median", "min", "max")),
            entry["extra_info"],
        )
        for entry in content["benchmarks"]
    ]
    machine = content["machine_info"]["alit"] | {"revision": _revision(content)}
    return Run(path.stem, machine, rows, content.get("left_out", {}))


def _revision(content: dict[str, Any]) -> str:
    """The commit that pytest-benchmark noted, and whether files differed from it; empty where it noted none."""
    noted = content.get("commit_info", {})
    commit = (noted.get("id") or "")[:7]
    if not re.fullmatch("[0-9a-f]{7}", commit):  # "unversioned", "unknown"
        return ""
    return f"{commit} with changes" if noted.get("dirty") else commit


def merged(name: str, runs: Iterable[Run]) -> Run:
    """Parts of one run on one machine; its ceilings are the best that were seen, its date is the last part's.

    Raises:
        ValueError: no part, or parts of different machines.
    """
    runs = list(runs)
    own = ("ceilings", "command", "date", "revision")
    machines = [{k: v for k, v in run.machine.items() if k not in own} for run in runs]
    if not runs or any(machine != machines[0] for machine in machines):
        raise ValueError(f"{name}: expected parts of one machine, got {machines}")
    first = runs[0].machine["ceilings"]
    whole = {
        "ceilings": {k: max(run.machine["ceilings"][k] for run in runs) for k in first},
        "date": max(run.machine["date"] for run in runs),
        "command": "; ".join(run.machine.get("command", "") for run in runs),
        "revision": ", ".join(sorted({run.machine["revision"] for run in runs} - {""})),
    }
    left_out = {group: found for run in runs for group, found in run.left_out.items()}
    return Run(name, machines[0] | whole, [row for run in runs for row in run.rows], left_out)


def ratios(run: Run) -> list[tuple[str, str, float]]:
    """(group, contender, its median over ours), best contender of each group first; without further ones of ours."""
    result = []
    for group, rows in run.groups.items():
        ours = next((row for row in rows if row.contender == "ours"), None)
        if ours is None:
            continue
        others = [row for row in rows if not row.contender.startswith("ours")]
        others.sort(key=lambda row: row.median)
        result += [(group, row.contender, row.median / ours.median) for row in others]
    return result
