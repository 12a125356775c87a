"""Contests: contenders compute the same thing, are verified, then timed in turns; each is a benchmark of its own."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alit.devices import choose
from alit_kernels._clock import Clock, clocks, host_seconds, kernels, samples_in_turns
from alit_kernels.nn.linear import linear

from .timing import OtherLoad, peak_megabytes

DEVICE = choose("auto").type
#: torch's threads on the CPU.
THREADS = 2
#: Time limit of the rounds of a contest; it is exceeded only by the fewest rounds.
SECONDS = 5.0 if DEVICE == "cpu" else math.inf


class Absent(Exception):
    """Raised by a contender that cannot run here; its message says what is missing."""


class Work(NamedTuple):
    """Least work of one call of a case: bytes that must move, and floating-point operations on rows without padding."""

    bytes: int = 0
    flops: int = 0


@dataclass
class Contest:
    """One case and its contenders.

    Attributes:
        prepare: name -> function that returns the call to time, or raises :class:`Absent`.
        verify: takes the result of a contender; raises ``AssertionError`` if it is wrong. With ``against_first`` it
            also takes the reference, the result of the first contender; if that one fails, all do.
        work: of one call.
        notes: more for the result file, for all contenders.
        inspect: takes a contender's name and call after the race; more for the result file, where
            "peak_megabytes" takes the place of the memory of one more call.
    """

    prepare: Mapping[str, Callable[[], Callable[[], Any]]]
    verify: Callable[..., None]
    work: Work
    against_first: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    inspect: Callable[[str, Callable[[], Any]], Mapping[str, Any]] = lambda name, call: {}
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    other_load: OtherLoad = field(default_factory=OtherLoad)

    def run(self, rounds: int, warmup: int = 1, limit: float = SECONDS) -> None:
        """Verify every contender, time those that pass, and verify the results of their last timed calls."""
        last: dict[str, Any] = {}  # results of the last timed calls
        reference: tuple[Any, ...] | None = () if not self.against_first else None
        for index, (name, prepare) in enumerate(self.prepare.items()):
            try:
                if index > 0 and reference is None:
                    raise RuntimeError(f"no reference: {next(iter(self.prepare))} has failed")
                call = prepare()
                result = call()
                if reference is None:
                    reference = (result,)
                else:
                    self.verify(result, *reference)
            except Exception as error:  # raised where its result is asked for; the others run
                self.failures[name] = error
            else:
                self.calls[name] = call
        with self.other_load:
            self.clocks = clocks(self.calls, last.__setitem__)
            self.samples = samples_in_turns(self.clocks, rounds=rounds, warmup=warmup, limit=limit)
        for name, result in last.items():
            try:
                self.verify(result, *(reference or ()))
            except Exception as error:
                self.failures[name] = error
                del self.calls[name], self.samples[name]

    def medians(self, rounds: int) -> dict[str, float]:
        """Median seconds of every contender that is not absent, after ``rounds`` rounds without a time limit.

        Raises:
            Exception: the failure of a contender.
        """
        self.run(rounds, limit=math.inf)
        for failure in self.failures.values():
            if not isinstance(failure, Absent):
                raise failure
        return {name: statistics.median(times) for name, times in self.samples.items()}

    def peak_megabytes(self, name: str) -> float:
        """Peak memory of one more call of a contender, in MB."""
        return peak_megabytes(self.calls[name])

    def info(self, name: str) -> dict[str, Any]:
        """Contender, clock, work, memory, load by other processes and notes: what a result file holds beside times."""
        call, kind = self.calls[name], self.clocks[name].kind
        found = self.inspect(name, call)
        return {
            "contender": name,
            "clock": kind,
            **({} if kind == "host" else apart(call, kind, self.samples[name])),
            **self.work._asdict(),
            "peak_megabytes": found.get("peak_megabytes") or self.peak_megabytes(name),
            "other_load_percent": self.other_load.percent,
            **self.notes,
            **found,
        }


def apart(call: Callable[[], Any], kind: str, samples: Sequence[float]) -> dict[str, Any]:
    """Device time and host time of a call to a GPU, each measured alone; None where unknown.

    Args:
        samples: seconds, by a clock of this kind. Times between events include the host's launches, so the device time
            of such a call is instead the sum of its kernels' times.

    Returns:
        device_us; host_us, until the call returns; launches of kernels, fills and copies.
    """
    found: dict[str, Any] = {
        "host_us": 1e6 * host_seconds(call),
        "device_us": None,
        "launches": None,
    }
    try:
        seconds = kernels(call)
    except RuntimeError as error:
        found["not_counted"] = str(error)
    else:
        found |= {"device_us": 1e6 * sum(seconds), "launches": len(seconds)}
    if kind != "events":
        found["device_us"] = 1e6 * statistics.median(samples)
    return found


def ready(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """:attr:`Contest.prepare` for contenders that need no preparation."""
    return {name: lambda call=call: call for name, call in calls.items()}


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Check that the largest error of each tensor is less than ``tolerance`` times its largest expected magnitude."""
    for result, right in zip(found, expected, strict=True):
        error = float((result - right).abs().max() / right.abs().max())
        assert error < tolerance, f"wrong by {error:.2g} of the largest value"


@functools.cache
def ceilings(rounds: int = 30) -> dict[str, float]:
    """Rates of a large copy (GB/s) and a large float32 matrix product (GFLOP/s; bf16 on a GPU), measured once.

    The product is computed by ``torch.matmul`` and by our ``linear``, which may use another library; the faster counts.
    """
    gpu = DEVICE == "cuda"
    source = torch.empty(2**30 if gpu else 2**26, dtype=torch.int8, device=DEVICE).zero_()
    target, dtype = torch.empty_like(source), torch.bfloat16 if gpu else torch.float32
    calls: dict[tuple[str, int], Callable[[], Any]] = {("copy", 0): lambda: target.copy_(source)}
    for size in (8192,) if gpu else (1024, 2048):
        factor = torch.randn(size, size, device=DEVICE, dtype=dtype)
        calls["matmul", size] = functools.partial(torch.matmul, factor, factor)
        calls["linear", size] = functools.partial(linear, factor, factor)
    samples = samples_in_turns(clocks(calls), rounds=rounds)
    best = {key: min(values) for key, values in samples.items()}  # a slow round is no ceiling
    products = (2 * size**3 / seconds for (_, size), seconds in best.items() if size)
    return {
        "copy_gigabytes": 2 * source.numel() / best["copy", 0] / 1e9,
        "matmul_gigaflops": max(products) / 1e9,
    }


class Replay(list[float]):
    """Clock for pytest-benchmark that plays back times taken before, so that its tables and files show them."""

    def __call__(self) -> float:
        return self.pop(0) if self else time.perf_counter()


REPLAY = Replay()
