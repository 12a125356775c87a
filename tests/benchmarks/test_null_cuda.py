"""Tools of the null CUDA that run without it: comparison of counts, hashes of sources, obstacles to its setup."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.null_cuda import counts, obstacle
from benchmarks.null_cuda.driver import Counts
from benchmarks.null_cuda.sources import ROOT, sources

HELD = {"a": Counts(3, 0, 20, 10), "b": Counts(5, 1, 40, 30)}
KINDS = Counts._fields


def test_more_is_told_with_case_and_numbers() -> None:
    found = HELD | {"b": Counts(6, 1, 39, 31)}
    more, less = counts.compared(found, HELD, KINDS)
    assert more == ["b: launches 5 -> 6, c 30 -> 31"]
    assert less == ["b: python 40 -> 39"]
    assert counts.compared(found, HELD, ("launches",)) == (["b: launches 5 -> 6"], [])
    assert counts.compared(HELD, HELD, KINDS) == ([], [])


def test_cases_are_the_same() -> None:
    one, other = {"a": HELD["a"]}, {"b": HELD["b"]}
    more, less = counts.compared(one, other, KINDS)
    assert more == ["a: not held", "b: held, but no longer counted"]
    assert not less


def test_counts_are_read_as_written(tmp_path: Path) -> None:
    counts.write(tmp_path / "counts.json", HELD)
    assert counts.read(tmp_path / "counts.json") == (counts.versions(), HELD)


def test_what_is_held() -> None:
    _, held = counts.read(counts.FILE)
    assert held["step of base"].launches > 1000
    assert not any(row.waits for row in held.values())


@pytest.mark.parametrize("measured", [sources(), "0123456789abcdef"])
def test_times_of_other_sources_are_refused(measured: str, tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.write_text(json.dumps({"sources": measured}))
    command = [
        sys.executable,
        "-I",
        "-S",
        "benchmarks/null_cuda/sources.py",
        "--compare",
        str(path),
    ]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == (measured != sources())
    assert told.stderr == "" or f"of sources {measured}" in told.stderr


def report(*urls: str) -> str:
    return json.dumps({"install": [{"download_info": {"url": url}} for url in urls]})


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (0, report("file:///wheels/torch.whl", "file:///triton.whl"), "", ""),
        (0, report("file:///torch.whl", "https://x/triton.whl"), "", "download https://x/triton.whl"),
        (1, "", "WARNING: w\nERROR: No matching distribution\nERROR: e", "ERROR: No matching distribution"),
        (None, "", "", "did not find torch==2.14.1 within 60 seconds"),
    ],
)  # fmt: skip
def test_whether_it_can_be_set_up(
    status: int | None, out: str, err: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if status is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(obstacle, "TOOLS", ())
    told = obstacle.obstacle(["torch==2.14.1"])
    assert told.endswith(expected) and bool(told) == bool(expected)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDACXX", "/cuda/bin/nvcc")
    assert obstacle.obstacle([]) == "gcc, g++, nm, readelf not found"
