"""Result rows by the code that runs on a GPU: graphs, host time and launches of ops and their peers.

The null CUDA has no clock and no profiler: kernels take no time, and the driver's count replaces the profiler's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

import alit_kernels as ak
from alit_kernels import _clock
from alit_kernels.attention import tune
from alit_kernels.attention.configurations import TABLE, Tile
from alit_kernels.soft_codebook.cases import Case, make
from benchmarks.harness import contest
from benchmarks.harness.contest import Absent, Contest, Work, ready
from benchmarks.harness.rows import compiled
from benchmarks.peers import eager
from benchmarks.suites.kernels import CONTESTS

from . import driver
from .launches import recorded


@pytest.fixture(autouse=True)
def profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(call: Callable[[], Any]) -> list[float]:
        before = driver.launches()
        call()
        return [0.0] * (driver.launches() - before)

    for module in (_clock, contest):
        monkeypatch.setattr(module, "kernels", kernels)


def race(**more: Callable[[], Any]) -> Contest:
    """Contest of ``soft_codebook`` and its eager formulation, without verification: nothing is computed."""
    inputs = make(Case(512, 256, 64), device="cuda")
    calls = {
        "ours": lambda: ak.soft_codebook(*inputs),
        "eager": lambda: eager.soft_codebook(*inputs),
    }
    return Contest(ready(calls | more), lambda found: None, Work())


def test_a_row() -> None:
    found = race()
    found.run(rounds=3)
    assert not found.failures
    for name, call in found.calls.items():
        row, counts = found.info(name), driver.counted(call)
        assert row["clock"] == "graph" and found.samples[name] == [0.0] * 3
        assert row["device_us"] == 0.0 and row["host_us"] > 0.0
        assert row["launches"] == counts.launches > 0, name
    assert found.info("ours")["launches"] < found.info("eager")["launches"]


@pytest.mark.parametrize("name", CONTESTS)
def test_rows_of_the_main_contests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of ours and of all peers that are present, except compiled ones and cuDNN, which queries the device."""
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda *_: False)
    found = CONTESTS[name](True)
    found.verify = lambda *_: None  # nothing is computed
    names = [x for x in found.prepare if not compiled(x) and x != "SDPA cuDNN"]
    found.prepare = {x: found.prepare[x] for x in names}
    found.run(rounds=1)
    assert all(isinstance(failure, Absent) for failure in found.failures.values())
    rows = {x: found.info(x) for x in found.calls}
    assert "ours" in rows and len(rows) > 1
    assert len({row["clock"] for row in rows.values()}) == 1
    assert all(row["host_us"] > 0.0 and row["device_us"] == 0.0 for row in rows.values())
    assert rows["ours"]["launches"] > 0


def test_a_peer_that_waits_has_the_clock_of_all() -> None:
    x = torch.ones(4, device="cuda")
    found = race(waits=lambda: x.sum().item())
    found.run(rounds=3)
    rows = {name: found.info(name) for name in found.calls}
    assert {row["clock"] for row in rows.values()} == {"kernels"}
    assert rows["waits"]["launches"] == driver.counted(lambda: x.sum().item()).launches > 0


@pytest.mark.parametrize("kernel", ("forward", "backward_queries", "backward_keys"))
def test_every_tile_is_launched_itself(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner launches each tile itself, although the launcher and plans remember the first tile of a call."""
    key = (kernel, 64, 2)
    present = TABLE[key][1]
    other = Tile(64, 32, 12 - present.warps, present.stages)
    monkeypatch.setattr(tune, "error", lambda found, expected: 0.0)
    call, _ = tune.workload(key, (65, 33), 2, "cuda")
    threads = {}
    for tile in (present, other, present):
        with tune.entry(key, tile):
            launches = [{x.threads for x in recorded(call)} for _ in range(3)]
        assert launches[0] == launches[1] == launches[2]
        assert launches[0] == threads.setdefault(tile, launches[0])
        assert 32 * tile.warps in launches[0]
    assert threads[present] != threads[other]
    times = tune.measure(key, [present, other], call, call(), 3)
    assert times == {present: [0.0] * 3, other: [0.0] * 3}
