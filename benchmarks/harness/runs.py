"""Read result files of ``pytest benchmarks --benchmark-json`` for the report."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from alit.atomic_files import replacing

#: Load by other processes, in percent of all processors, above which a time is marked and a breakdown is left out.
BUSY = 5.0
#: A breakdown is also left out if its step took more than this many times the slowest timed one.
SLOWER = 1.25


class Row(NamedTuple):
    """One contender of one case: seconds of each round, and the contest's notes."""

    group: str
    contender: str
    seconds: list[float]
    info: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def device(self) -> float | None:
        """Device time of a GPU in seconds; None if unknown."""
        found = self.info.get("device_us")
        return None if found is None else found / 1e6

    @property
    def host(self) -> float | None:
        """Seconds until a call to a GPU returns; None if unknown."""
        found = self.info.get("host_us")
        return None if found is None else found / 1e6

    @property
    def call(self) -> float | None:
        """Seconds that a caller waits for a model's step on a GPU; None for other rows."""
        return self.median if self.info.get("clock") == "events" else None

    @property
    def gigaflops(self) -> float:
        """Billions of floating-point operations per second."""
        return self.info["flops"] / self.median / 1e9

    @property
    def gigabytes(self) -> float:
        """Billions of bytes per second."""
        return self.info["bytes"] / self.median / 1e9

    @property
    def parts(self) -> dict[str, float] | None:
        """Seconds of a training step by part; None if not measured, or disturbed by other processes."""
        load, parts = self.info.get("parts_other_load_percent", 100.0), self.info.get("parts")
        disturbed = load is not None and load > BUSY
        if disturbed or parts is None or sum(parts.values()) > SLOWER * max(self.seconds):
            return None
        return parts


class Run(NamedTuple):
    """Content of one result file, or of a folder of the parts of one run."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]
    left_out: dict[str, dict[str, str]] = {}  # noqa: RUF012 (immutable): case -> contender -> why

    @property
    def apart(self) -> bool:
        """True if device and host times are known apart; else times on a GPU are those of calls."""
        return any("device_us" in row.info for row in self.rows)

    @property
    def groups(self) -> dict[str, dict[str, Row]]:
        """Case -> contender -> row."""
        grouped: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, {})[row.contender] = row
        return grouped


def files(path: Path) -> list[Path]:
    """Result files of a run: ``test_*.json`` in a folder, sorted, or the file itself."""
    return sorted(path.glob("test_*.json")) if path.is_dir() else [path]


def compact(path: Path) -> None:
    """Rewrite a result file in one line, a sixth of pytest-benchmark's size: the entries that the report reads, all
    times and the commit; numbers with seven digits.
    """
    text = path.read_text()
    content = json.loads(text, parse_float=lambda number: float(f"{float(number):.7g}"))
    kept = {
        "machine_info": {"alit": content["machine_info"]["alit"]},
        "commit_info": {k: v for k, v in content["commit_info"].items() if k in ("id", "dirty")},
        **({"contests": content["contests"]} if "contests" in content else {}),
        "left_out": content.get("left_out", {}),
        "benchmarks": [
            {
                "group": entry["group"],
                "extra_info": entry["extra_info"],
                "stats": {"data": entry["stats"]["data"]},
            }
            for entry in content["benchmarks"]
        ],
    }
    short = json.dumps(kept, separators=(",", ":")) + "\n"
    if short != text:
        with replacing(path) as file:
            file.write_text(short)


def read(path: Path) -> Run:
    """Run in a file of pytest-benchmark, or in a folder whose ``test_*.json`` are the parts of one run.

    Raises:
        ValueError: it is no such file, or not one of this suite.
    """
    if path.is_dir():
        return merged(path.name, map(read, files(path)))
    content = json.loads(path.read_text())
    if "benchmarks" not in content or "alit" not in content.get("machine_info", {}):
        raise ValueError(f"{path}: expected a result of 'pytest benchmarks --benchmark-json'")
    rows = [
        Row(x["group"], x["extra_info"]["contender"], x["stats"]["data"], x["extra_info"])
        for x in content["benchmarks"]
    ]
    # pytest-benchmark notes "unversioned" or "unknown" where there is no repository.
    noted = content.get("commit_info", {})
    revision = (noted.get("id") or "")[:7] + (" with changes" if noted.get("dirty") else "")
    if not re.match("[0-9a-f]{7}", revision):
        revision = ""
    machine = content["machine_info"]["alit"] | {"revision": revision}
    return Run(path.stem, machine, rows, content.get("left_out", {}))


def merged(name: str, runs: Iterable[Run]) -> Run:
    """One run made of its parts on one machine; it has their highest ceilings and their last date.

    Raises:
        ValueError: no part, or parts of different machines.
    """
    runs = list(runs)
    own = ("ceilings", "command", "date", "revision", "versions")
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
    """(case, contender, its median time over ours), fastest first within a case; without our other variants."""
    result = []
    for group, rows in run.groups.items():
        if "ours" not in rows:
            continue
        others = [row for row in rows.values() if not row.contender.startswith("ours")]
        others.sort(key=lambda row: row.median)
        ours = rows["ours"].median
        result += [(group, row.contender, row.median / ours) for row in others]
    return result
