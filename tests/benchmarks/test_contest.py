"""Benchmarks report only verified contenders: broken and absent ones, the clock, peak memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from alit import FixedLength
from benchmarks.harness import contest
from benchmarks.harness.contest import Absent, Contest, Work, ready
from benchmarks.harness.timing import OtherLoad, peak_megabytes
from benchmarks.suites import (
    test_attention,
    test_codebooks,
    test_encode_decode,
    test_mlp,
    test_ragged,
    test_soft_codebook,
)
from benchmarks.suites.models import LENGTHS, model
from tests.helpers.forks import another_process
from tests.helpers.pytest_runs import run_pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
import benchmarks.conftest
benchmarks.conftest.ceilings = dict  # which take longer than all else
pytest_plugins = ["benchmarks.conftest"]
"""
SUITE = """
import pytest
from benchmarks.harness.contest import Absent, Contest, Work
from benchmarks.suites.test_codebooks import Case, search

def broken():
    race = search(Case(256, 64, 12))
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


@pytest.mark.apart
def test_broken_kernel_fails_and_is_not_timed(tmp_path: Path) -> None:
    """In a pytest run wrong and crashing contenders fail, the right one is timed, and the absent one is skipped."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_planted.py").write_text(SUITE)
    status, said = run_pytest(tmp_path, "-rs", "test_planted.py", "--benchmark-json=out.json")
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert "3 failed, 1 passed, 1 skipped" in said
    assert "RuntimeError: no compiler" in said
    assert "AssertionError: not the nearest codewords" in said
    assert "missing is absent: no such library" in said
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
        lambda: test_codebooks.search(test_codebooks.QUICK),
        lambda: test_codebooks.quantizer(test_codebooks.QUICK),
        lambda: test_codebooks.statistics(test_codebooks.QUICK),
        lambda: test_codebooks.entropies(test_codebooks.SMALL_ENTROPIES),
        lambda: test_mlp.contest(8),
        lambda: test_ragged.contest("unpack", [289, 3]),
        lambda: test_encode_decode.decoding(quick=True),
    ),
    ids=(
        *("attention", "soft_codebook", "nearest_codeword", "vector_quantize"),
        *("codebook_statistics", "codebook_entropy", "mlp", "ragged", "decode"),
    ),
)
def test_zeros_are_not_timed(make: object) -> None:
    """A contender whose results are partly zeros, as left by an unwritten output, is not timed."""
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
    contest = test_encode_decode.decoding(quick=True)
    ours = model(quick=True).eval()
    black = torch.zeros(len(LENGTHS), 3, *ours.config.image_size)
    other = ours.encode(black, FixedLength(LENGTHS))
    contest.prepare = {**contest.prepare, "black": lambda: lambda: ours.decode(other)}
    contest.run(rounds=1, warmup=0)
    assert contest.failures.keys() == {"black"}


def numbers(against_first: bool = False, **calls: Callable[[], int]) -> Contest:
    """Contest of contenders that should return 1, or the number that the first one returns."""
    if against_first:
        return Contest(ready(calls), assert_equal, Work(), against_first=True)
    return Contest(ready(calls), lambda found: assert_equal(found, 1), Work())


def assert_equal(found: int, expected: int) -> None:
    assert found == expected


def test_what_is_wrong_only_when_it_is_timed_is_not_reported() -> None:
    calls = iter((1, *[0] * 20))
    contest = numbers(tiring=lambda: next(calls), ours=lambda: 1)
    contest.run(rounds=3)
    assert contest.samples.keys() == {"ours"} == contest.calls.keys()
    assert isinstance(contest.failures["tiring"], AssertionError)


def test_medians_are_of_those_that_are_here() -> None:
    """Medians leave absent contenders out; a wrong contender raises."""
    contest = numbers(ours=lambda: 1)
    contest.prepare = {"absent": absent, **contest.prepare}
    assert contest.medians(rounds=2).keys() == {"ours"} and len(contest.samples["ours"]) == 2
    assert isinstance(contest.failures["absent"], Absent)
    with pytest.raises(AssertionError):
        numbers(ours=lambda: 1, wrong=lambda: 2).medians(rounds=2)


def absent() -> None:
    raise Absent("not here")


def test_the_first_contender_is_the_reference() -> None:
    contest = numbers(True, eager=lambda: 2, ours=lambda: 2, wrong=lambda: 1)
    contest.run(rounds=1, warmup=0)
    assert contest.samples.keys() == {"eager", "ours"}
    assert isinstance(contest.failures["wrong"], AssertionError)


def test_without_its_reference_nothing_is_timed() -> None:
    def crashing() -> int:
        raise RuntimeError("out of memory")

    contest = numbers(True, eager=crashing, ours=lambda: 1)
    contest.run(rounds=1, warmup=0)
    assert not contest.samples
    assert "no reference: eager has failed" in str(contest.failures["ours"])


def peak_of_three_tensors() -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def call() -> None:
        for _ in range(3):
            torch.ones(25_000_000, device=device)

    call()
    return peak_megabytes(call)


def test_peak_memory() -> None:
    """Peak memory is that of tensors alive at the same time. Measured in a new process: in an old heap with holes the C
    library puts the second tensor beside the place of the first, which is too small for an aligned one.
    """
    with another_process() as process:
        assert 95 < process.submit(peak_of_three_tensors).result() < 110


def busy() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_a_contender_in_another_process_is_no_other_load() -> None:
    with another_process() as process:
        process.submit(time.time).result()
        before = OtherLoad._now()
        process.submit(busy).result()
        after = OtherLoad._now()
    assert before and after and after[2] - before[2] > 0.25


def test_the_reference_is_not_timed_as_ours(tmp_path: Path) -> None:
    reference = {"ALIT_KERNELS_IMPLEMENTATION": "reference"}
    options = ("benchmarks", "--collect-only", "-q")
    status, said = run_pytest(tmp_path, *options, at=ROOT, **reference)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "benchmarks would time the slow reference" in said


def test_device_and_host_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device time is that of the samples' clock; for a model's step, whose samples include launches, its kernels'."""
    monkeypatch.setattr(contest, "kernels", lambda call: [2e-6, 3e-6])
    monkeypatch.setattr(contest, "host_seconds", lambda call: 7e-6)
    samples = [9e-6, 8e-6, 1.0]
    rest = {"launches": 2, "host_us": pytest.approx(7.0)}
    for kind, device in (("graph", 9.0), ("kernels", 9.0), ("events", 5.0)):
        found = contest.apart(lambda: None, kind, samples)
        assert found == rest | {"device_us": pytest.approx(device)}, kind

    def blind(call: object) -> list[float]:
        raise RuntimeError("saw no kernel")

    monkeypatch.setattr(contest, "kernels", blind)
    rest = {"launches": None, "host_us": pytest.approx(7.0), "not_counted": "saw no kernel"}
    for kind, of_graph in (("graph", pytest.approx(9.0)), ("events", None)):
        assert contest.apart(lambda: None, kind, samples) == rest | {"device_us": of_graph}
