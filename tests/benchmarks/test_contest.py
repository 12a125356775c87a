"""A benchmark reports what is right, and only that: broken and absent contenders, the clock, the stopwatch."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from alit import FixedLength
from benchmarks.harness import timing
from benchmarks.harness.contest import REPLAY, Absent, Contest, Replay, Work
from benchmarks.harness.timing import FEWEST, OtherLoad, clock, peak_megabytes, samples_in_turns
from benchmarks.suites import (
    test_attention,
    test_codebook_statistics,
    test_decode,
    test_mlp,
    test_nearest_codeword,
    test_ragged,
    test_soft_codebook,
    test_vector_quantize,
)
from benchmarks.suites.models import LENGTHS, model

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest
from benchmarks.harness.contest import Absent, Contest, Work
from benchmarks.suites.test_nearest_codeword import Case, contest

def broken():
    race = contest(Case(256, 64, 12))
    right = race.prepare["ours"]
    race.prepare = {
        "ours": lambda: lambda: (right()() + 1) % 64,
        "eager": race.prepare["eager"],
        "crashing": crashing,
        "missing": missing,
        "silent": silent,
    }
    return race

def silent():
    raise NotImplementedError

def crashing():
    raise RuntimeError("no compiler")

def missing():
    raise Absent("no such library")

@pytest.mark.parametrize("name", ("ours", "crashing", "eager", "missing", "silent"))
def test_it(name, race):
    race("broken", name, broken, rounds=3)
"""


def test_broken_kernel_fails_and_is_not_timed(tmp_path: Path) -> None:
    """Through pytest itself: wrong and crashing ones are failures, the right one is timed, the absent one skipped."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["benchmarks.conftest"]\n')
    (tmp_path / "test_planted.py").write_text(SUITE)
    serial = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_planted.py"),
            *(f"--rootdir={tmp_path}", "--benchmark-json=out.json"),
        ],
        cwd=tmp_path,
        env={**serial, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 1 passed, 1 skipped" in done.stdout
    assert "RuntimeError: no compiler" in done.stdout
    assert "AssertionError: not the nearest codewords" in done.stdout
    assert "missing is absent: no such library" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["left_out"] == {
        "broken": {
            "ours": "wrong: not the nearest codewords",
            "crashing": "failed: no compiler",
            "missing": "absent: no such library",
            "silent": "failed: NotImplementedError",
        }
    }
    (entry,) = written["benchmarks"]
    assert entry["extra_info"]["contender"] == "eager"
    assert entry["extra_info"]["clock"] == ("graph" if torch.cuda.is_available() else "host")
    assert len(entry["stats"]["data"]) == 3 and entry["stats"]["median"] > 1e-6


@pytest.mark.parametrize(
    "make",
    (
        lambda: test_attention.contest((5, 9), True),
        lambda: test_soft_codebook.contest(test_soft_codebook.QUICK),
        lambda: test_nearest_codeword.contest(test_nearest_codeword.QUICK),
        lambda: test_vector_quantize.contest(test_vector_quantize.QUICK),
        lambda: test_codebook_statistics.contest(test_codebook_statistics.QUICK),
        lambda: test_mlp.contest(8),
        lambda: test_ragged.contest("unpack", [289, 3]),
        lambda: test_decode.decoding(quick=True),
    ),
    ids=(
        *("attention", "soft_codebook", "nearest_codeword", "vector_quantize"),
        *("codebook_statistics", "mlp", "ragged", "decode"),
    ),
)
def test_zeros_are_not_timed(make: object) -> None:
    """A kernel that leaves any of its results unwritten must not win."""
    contest: Contest = make()  # type: ignore[operator]
    right = contest.prepare["ours"]
    found = right()()
    count = 1 if isinstance(found, torch.Tensor) else len(found)

    def zeros(where: int) -> object:
        result = right()()
        if isinstance(result, torch.Tensor):
            return torch.zeros_like(result)
        return type(result)(torch.zeros_like(x) if i == where else x for i, x in enumerate(result))

    planted = {f"zeros {where}": lambda where=where: lambda: zeros(where) for where in range(count)}
    contest.prepare = {"ours": right, **planted}
    contest.run(rounds=1, warmup=0)
    assert contest.samples.keys() == {"ours"}
    assert all(isinstance(contest.failures[name], AssertionError) for name in planted)


def test_other_tokens_are_no_decode() -> None:
    contest = test_decode.decoding(quick=True)
    ours = model(quick=True).eval()
    black = torch.zeros(len(LENGTHS), 3, *ours.config.image_size)
    other = ours.encode(black, FixedLength(LENGTHS))
    contest.prepare = {**contest.prepare, "black": lambda: lambda: ours.decode(other)}
    contest.run(rounds=1, warmup=0)
    assert contest.failures.keys() == {"black"}


def test_what_is_wrong_only_when_it_is_timed_is_not_reported() -> None:
    calls = iter((1, *[0] * 20))
    contest = Contest(
        {"tiring": lambda: lambda: next(calls), "ours": lambda: lambda: 1},
        lambda result: assert_equal(result, 1),
        Work(),
    )
    contest.run(rounds=3)
    assert contest.samples.keys() == {"ours"} == contest.calls.keys()
    assert isinstance(contest.failures["tiring"], AssertionError)


def test_absent_is_no_failure() -> None:
    def absent() -> None:
        raise Absent("not here")

    contest = Contest({"absent": absent, "ours": lambda: lambda: 1}, lambda result: None, Work())
    contest.run(rounds=2)
    assert isinstance(contest.failures["absent"], Absent) and len(contest.samples["ours"]) == 2


def test_contenders_take_turns() -> None:
    order: list[str] = []
    clocks = {name: clock(lambda name=name: order.append(name)) for name in "ab"}
    samples = samples_in_turns(clocks, rounds=2, warmup=1)
    if not torch.cuda.is_available():
        assert order == ["a", "a", "b", "b"] * 3  # short calls: the first wakes the threads
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the host's clock")
def test_a_long_call_is_timed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORT_ON_HOST", 0.0)
    order: list[str] = []
    samples_in_turns({"a": clock(lambda: order.append("a"))}, rounds=2, warmup=1)
    assert order == ["a"] * 3


def test_no_round_but_the_fewest_starts_after_the_limit() -> None:
    clocks = {name: clock(lambda: None) for name in "ab"}
    samples = samples_in_turns(clocks, rounds=9, limit=0.0)
    assert {name: len(values) for name, values in samples.items()} == {"a": FEWEST, "b": FEWEST}


def test_the_first_contender_is_the_reference() -> None:
    contest = Contest(
        {name: lambda x=x: lambda: x for name, x in {"eager": 1, "ours": 1, "wrong": 2}.items()},
        assert_equal,
        Work(),
        against_first=True,
    )
    contest.run(rounds=1, warmup=0)
    assert contest.samples.keys() == {"eager", "ours"}
    assert isinstance(contest.failures["wrong"], AssertionError)


def test_without_its_reference_nothing_is_timed() -> None:
    def crashing() -> None:
        raise RuntimeError("out of memory")

    contest = Contest(
        {"eager": lambda: crashing, "ours": lambda: lambda: 1},
        assert_equal,
        Work(),
        against_first=True,
    )
    contest.run(rounds=1, warmup=0)
    assert not contest.samples
    assert "no reference: eager has failed" in str(contest.failures["ours"])


def assert_equal(found: int, expected: int) -> None:
    assert found == expected


def test_replayed_time_is_what_the_table_shows() -> None:
    clock = Replay()
    clock.load(0.25)
    start = clock()
    assert clock() - start == 0.25
    assert isinstance(REPLAY, Replay)


def peak_of_three_tensors() -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def call() -> None:
        for _ in range(3):
            torch.ones(25_000_000, device=device)

    call()
    return peak_megabytes(call)


def test_peak_memory() -> None:
    """What is alive at once counts, once. In a process of its own: where an old heap has a hole, the C library puts the
    second tensor beside the first, of which an aligned one does not fit into the place.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert 95 < process.submit(peak_of_three_tensors).result() < 110


def busy() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_other_load_leaves_out_our_own() -> None:
    load = OtherLoad()
    with load:
        busy()
    assert load.percent is not None
    assert 0 <= load.percent <= 100


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_a_contender_in_another_process_is_no_other_load() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(time.time).result()
        before = OtherLoad._now()
        process.submit(busy).result()
        after = OtherLoad._now()
    assert before and after and after[2] - before[2] > 0.25


def test_the_reference_is_not_timed_as_ours() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    environment = os.environ | {"ALIT_KERNELS_IMPLEMENTATION": "reference"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "benchmarks would time the slow reference" in done.stdout + done.stderr
