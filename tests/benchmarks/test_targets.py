"""Targets: their values in a run, and a benchmark case for each of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from benchmarks.harness.runs import Row, Run
from benchmarks.harness.targets import BESIDE, Target, targets

ROOT = Path(__file__).parents[2]
#: Script that prints the names of all cases on a GPU of 141 GB, without computing anything.
CASES = """
import sys
from types import SimpleNamespace
import pytest
import torch

torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda *_, **__: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=141e9, major=9, minor=0)

import alit.devices

alit.devices.choose = lambda name: torch.device("cuda")

class Asked:
    def pytest_sessionstart(self, session):
        import benchmarks.conftest
        from benchmarks.harness.rows import Rows
        benchmarks.conftest.available = lambda *_: ""
        Rows.whole = lambda rows, group: print("case:", group) or True

    pytest_sessionstart = pytest.hookimpl(tryfirst=True)(pytest_sessionstart)

options = ("-q", "-s", "-p", "no:cacheprovider", "-p", "no:randomly")
sys.exit(pytest.main(["benchmarks/suites", *options], plugins=[Asked()]))
"""


@pytest.mark.apart
def test_there_is_a_benchmark_for_every_target() -> None:
    done = subprocess.run([sys.executable, "-c", CASES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = set(re.findall("case: (.*)", done.stdout))
    assert {case for target in targets() for case in target.cases} <= cases


def run(devices: dict[str, dict[str, float]], host: float = 1.0) -> Run:
    """Run with these device times: case -> contender -> microseconds."""
    rows = [
        Row(case, name, [us / 1e6], {"device_us": us, "host_us": host, "clock": "graph"})
        for case, contenders in devices.items()
        for name, us in contenders.items()
    ]
    return Run("gpu", {"ceilings": {"matmul_gigaflops": 1.0}}, rows)


def target(beginning: str) -> Target:
    (found,) = (each for each in targets() if each.what.startswith(beginning))
    return found


def test_the_best_peer_counts_wherever_it_stands() -> None:
    """The best peer counts in any contest of a case: compiled peers are compared with ours in their own contest."""
    wanted, case = target("attention forward 32 x 289:"), "attention forward 32 x 289"
    plain = {"ours": 10.0, "SDPA flash": 20.0, "SDPA cuDNN": 10.0, "eager": 1.0}
    assert wanted.found(run({case: plain})) == "1 (met)"
    compiled = {"ours": 12.0, "FlexAttention": 10.0, "torch.compile": 1.0}
    found = run({case: plain, BESIDE[0].format(case): compiled})
    assert wanted.found(found) == "1.2 (missed)"
    assert wanted.found(run({case: {"ours": 10.0, "eager": 1.0}})) == "unmeasured"
    assert wanted.found(run({case: {"SDPA flash": 1.0}})) == "unmeasured"


def test_a_backward_is_a_step_less_its_forward() -> None:
    wanted = target("attention backward 32 x 321")
    forward = {"ours": 10.0, "SDPA flash": 12.0, "torch varlen_attn": 30.0}
    step = {"ours": 30.0, "SDPA flash": 28.0, "torch varlen_attn": 29.0, "SDPA cuDNN": 1.0}
    cases = {"attention forward 32 x 321": forward, "attention step 32 x 321": step}
    assert wanted.found(run(cases)) == "1.25 (missed)"
    assert wanted.found(run({"attention step 32 x 321": step})) == "unmeasured"


def test_the_best_captured_step_counts() -> None:
    """The best captured step counts, compiled ones included."""
    wanted, case = target("stage-1 step base"), "stage-1 step base bfloat16 batch 32"
    info = {"device_us": 1.0, "flops": 10**9, "clock": "events"}
    rows = [Row(case, name, [2.0], info) for name in ("ours", "ours, captured")]
    machine = {"ceilings": {"matmul_gigaflops": 1.0}}
    assert wanted.found(Run("gpu", machine, rows)) == "50 % (met)"
    rows.append(Row(BESIDE[1].format(case), "ours, compiled and captured", [1.25], info))
    assert wanted.found(Run("gpu", machine, rows)) == "80 % (met)"
    assert wanted.found(Run("gpu", machine, rows[:1])) == "unmeasured"


def test_speeds() -> None:
    case = "attention step 32 x 289 to 513"
    rows = {"ours": 10.0, "SDPA cuDNN": 14.0, "SDPA math": 90.0, "torch varlen_attn": 10.5}
    assert target(f"{case}: speed over padded").found(run({case: rows})) == "1.4 (met)"
    assert target(f"{case}: speed over varlen").found(run({case: rows})) == "1.05 (missed)"


def test_of_every_kind_there_are_all_rows() -> None:
    names = [each.what for each in targets()]
    assert len(names) == len(set(names)) == 36
    assert {each.unit for each in targets()} == {"", "us", "%"}
    assert sum(each.what.startswith("attention") for each in targets()) == 16 + 4 + 1
