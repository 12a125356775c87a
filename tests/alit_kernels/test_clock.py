"""The clock: one kind for all calls that are compared; that of a GPU with an imitated CUDA."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alit_kernels import _clock
from alit_kernels._clock import FEWEST, Clock, clocks, host_seconds, samples_in_turns, spread

WRITE = 70e-6


class Device:
    """Imitation of the parts of ``torch.cuda`` that the clock uses; calls advance its time.

    Time does not pass within a capture: a replay takes the captured time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.captured, self.launches = 0.0, None, 0
        self.profiled: list[float] | None = None
        self.waiting_is_an_error = False
        self.counts = True
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                device.synchronize()

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        class Graph:
            def replay(self) -> None:
                device.now += self.seconds

        class Capture:
            def __init__(self, graph: Graph, stream: object) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                device.captured = 0.0

            def __exit__(self, *_: object) -> None:
                self.graph.seconds, device.captured = device.captured, None

        class Stream:
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        class Flush:
            def zero_(self) -> None:
                device.kernel(WRITE)

        class Profile:
            def __init__(self, activities: object) -> None: ...

            def __enter__(self) -> Profile:
                device.profiled = []
                return self

            def __exit__(self, *_: object) -> None:
                found = [(seconds, False) for seconds in device.profiled if device.counts]
                # A named range seen on the device, and an event of the host.
                events = [self.event(1.0, "CUDA", True), self.event(1.0, "CPU", False)]
                events += [self.event(seconds, "CUDA", named) for seconds, named in found]
                results = SimpleNamespace(events=lambda: events)
                self.profiler = SimpleNamespace(kineto_results=results)
                device.profiled = None

            @staticmethod
            def event(seconds: float, device: str, named: bool) -> Any:
                return SimpleNamespace(
                    duration_ns=lambda: seconds * 1e9,
                    device_type=lambda: getattr(torch.autograd.DeviceType, device),
                    is_user_annotation=lambda: named,
                )

        monkeypatch.setenv("TEARDOWN_CUPTI", "0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_debug_mode)
        monkeypatch.setattr(torch.profiler, "profile", Profile)
        monkeypatch.setattr(_clock.torch, "empty", lambda *_, **__: Flush())

    def synchronize(self) -> None:
        assert self.captured is None

    def set_debug_mode(self, mode: str) -> None:
        self.waiting_is_an_error = mode == "error"

    def kernel(self, seconds: float) -> None:
        if self.captured is not None:
            self.captured += seconds
            return
        self.now += seconds
        if self.profiled is not None:
            self.profiled.append(seconds)

    def call(
        self, *kernels: float, host: float = 0.0, waits: bool = False, captures: bool = True
    ) -> Callable[[], str]:
        """Call of kernels that take these seconds, with the device idle for ``host`` seconds before each."""

        def call() -> str:
            if waits and self.waiting_is_an_error:
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.captured is not None and (waits or not captures):
                raise RuntimeError("operation not permitted when stream is capturing")
            for seconds in kernels:
                if self.captured is None:
                    self.now += host
                self.kernel(seconds)
            return f"{len(kernels)} kernels"

        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, tuple[str, float]]:
    found = clocks(calls)
    samples = samples_in_turns(found, rounds=2)
    assert all(len(values) == 2 for values in samples.values())
    return {name: (found[name].kind, pytest.approx(samples[name][0])) for name in calls}


def test_kernels_alone(device: Device) -> None:
    """Times by graphs include neither the write that flushes the cache nor the host."""
    calls = {"a": device.call(20e-6, 3e-6, host=200e-6), "b": device.call(50e-6)}
    assert timed(calls) == {"a": ("graph", 23e-6), "b": ("graph", 50e-6)}


@pytest.mark.parametrize("obstacle", ({"waits": True}, {"captures": False}))
def test_all_have_the_clock_of_the_one_that_is_not_captured(
    obstacle: dict[str, bool], device: Device
) -> None:
    calls = {"a": device.call(20e-6), "b": device.call(5e-6, 5e-6, host=1e-4, **obstacle)}
    assert timed(calls) == {"a": ("kernels", 20e-6), "b": ("kernels", 10e-6)}
    # Without the profiler the remaining clock includes launches, and its kind says so.
    device.counts = False
    assert timed(calls) == {"a": ("events", 20e-6), "b": ("events", 210e-6)}


def test_a_models_step_is_what_its_user_waits_for(device: Device) -> None:
    calls = {"a": device.call(0.1, host=0.05), "b": device.call(6e-3, waits=True)}
    assert timed(calls) == {"a": ("events", 0.15), "b": ("events", 6e-3)}
    # Not if one of the calls is short.
    calls |= {"c": device.call(4e-3)}
    assert {kind for kind, _ in timed(calls).values()} == {"kernels"}
    del calls["b"]
    assert timed(calls) == {"a": ("graph", 0.1), "c": ("graph", 4e-3)}


def test_results_are_seen(device: Device) -> None:
    for obstacle in ({}, {"waits": True}, {"host": 0.1}):
        last: dict[str, object] = {}
        calls = {"a": device.call(1e-6, **obstacle), "b": device.call(1e-6, 1e-6, host=0.1)}
        samples_in_turns(clocks(calls, last.__setitem__), rounds=1)
        assert last == {"a": "1 kernels", "b": "2 kernels"}


def test_host_time_is_of_the_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time is the median of as many calls as there is time for, at least FEWEST, each on an idle device."""
    clock = SimpleNamespace(at=0.0)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock.at))
    monkeypatch.setattr(_clock.time, "monotonic", lambda: clock.at)
    monkeypatch.setattr(_clock.time, "perf_counter", lambda: clock.at)
    for seconds, calls in ((1e-3, 100), (0.3, 4), (9.0, FEWEST)):
        waits.clear()

        def call() -> None:
            clock.at += seconds  # noqa: B023

        assert host_seconds(call) == pytest.approx(seconds)
        assert len(waits) == calls + 1, "and once at the end"


@pytest.mark.parametrize(
    ("cuda", "detached"), (("12.4", "0"), ("12.6", "1"), ("13.0", "1"), (None, "0"))
)
def test_the_profiler_lets_go_where_that_is_safe(
    cuda: str | None, detached: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profiler is told to detach on CUDA versions where that is safe, unless the environment sets it."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("TEARDOWN_CUPTI")
    assert _clock.kernels(device.call(1e-6, 2e-6)) == pytest.approx([1e-6, 2e-6])
    assert os.environ["TEARDOWN_CUPTI"] == detached
    monkeypatch.setenv("TEARDOWN_CUPTI", "other")
    _clock.kernels(device.call(1e-6))
    assert os.environ["TEARDOWN_CUPTI"] == "other"


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == 2.0
    assert spread([1.0]) == math.inf


def test_no_round_but_the_fewest_starts_after_the_limit() -> None:
    found = {name: Clock("host", lambda: 0.0) for name in "ab"}
    samples = samples_in_turns(found, rounds=9, limit=0.0)
    assert {name: len(values) for name, values in samples.items()} == {"a": FEWEST, "b": FEWEST}


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the host's clock")
@pytest.mark.parametrize(("short", "calls"), ((0.2, 2), (0.0, 1)))
def test_contenders_take_turns(short: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders take turns; a short call is preceded by one that wakes the threads."""
    monkeypatch.setattr(_clock, "SHORT_ON_HOST", short)
    order: list[str] = []
    found = clocks({name: lambda name=name: order.append(name) for name in "ab"})
    samples = samples_in_turns(found, rounds=2, warmup=1)
    assert order == [*"a" * calls, *"b" * calls] * 3
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}
