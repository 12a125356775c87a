"""A contest: several ways to compute one thing, verified, then timed in turns, each reported as its own benchmark."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alit.atomic_files import replacing
from alit_kernels.nn.linear import linear

from .timing import OtherLoad, clock, machine, peak_megabytes, samples_in_turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of torch, on the CPU.
THREADS = 2
#: Of the rounds of a contest on the CPU, unless the fewest take longer.
SECONDS = 5.0
#: Distributions whose versions a result notes.
PEERS = (
    "torch",
    "triton",
    "faiss-cpu",
    "flash-kmeans",
    "vector-quantize-pytorch",
    "xformers",
    "flash-attn",
)


class Absent(Exception):
    """Raised by a contender that cannot run here; its message says what is missing."""


class Work(NamedTuple):
    """What a case has to do, whoever does it: bytes that must move and floating-point operations on true rows."""

    bytes: int = 0
    flops: int = 0


@dataclass
class Contest:
    """One case and its contenders.

    Attributes:
        prepare: name -> function that returns the call to time, or raises :class:`Absent`.
        verify: takes what a contender returned; raises ``AssertionError`` where it is wrong. With ``against_first``
            what the first contender returned, too, which is the reference: where that one fails, all do.
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
    clock_kinds: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    other_load: OtherLoad = field(default_factory=OtherLoad)

    def run(self, rounds: int, warmup: int = 1) -> None:
        """Verify every contender, time those that are right, and verify what the last timed calls returned."""
        last: dict[str, Any] = {}  # of what timed calls returned
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
            limit = SECONDS if DEVICE == "cpu" else math.inf
            clocks = {
                name: clock(call, functools.partial(last.__setitem__, name))
                for name, call in self.calls.items()
            }
            self.samples = samples_in_turns(clocks, rounds=rounds, warmup=warmup, limit=limit)
            self.clock_kinds = {name: own.kind for name, own in clocks.items()}
        for name, result in last.items():
            try:
                self.verify(result, *(reference or ()))
            except Exception as error:
                self.failures[name] = error
                del self.calls[name], self.samples[name]

    def info(self, name: str) -> dict[str, Any]:
        """What the report needs beside the times."""
        seconds = statistics.median(self.samples[name])
        ceiling = ceilings()
        rates = {
            "gigabytes_per_second": self.work.bytes / seconds / 1e9,
            "gigaflops": self.work.flops / seconds / 1e9,
        }
        found = self.inspect(name, self.calls[name])
        return {
            "contender": name,
            "clock": self.clock_kinds[name],
            "bytes": self.work.bytes,
            "flops": self.work.flops,
            **rates,
            "percent_of_copy": 100 * rates["gigabytes_per_second"] / ceiling["copy_gigabytes"],
            "percent_of_matmul": 100 * rates["gigaflops"] / ceiling["matmul_gigaflops"],
            "peak_megabytes": found.get("peak_megabytes") or peak_megabytes(self.calls[name]),
            "other_load_percent": self.other_load.percent,
            "versions": versions(),
            "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
            **self.notes,
            **found,
        }


@functools.cache
def versions() -> dict[str, str]:
    """Of torch and of every peer that is installed."""
    found = {}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def ceilings() -> dict[str, float]:
    """What this machine reaches in a large copy and a large float32 matrix product (bf16 on a GPU), measured once.

    The product by ``@`` and by our linear layer, which may take another library: the faster counts.
    """
    gpu = DEVICE == "cuda"
    source = torch.empty(2**30 if gpu else 2**26, dtype=torch.int8, device=DEVICE).zero_()
    target, dtype = torch.empty_like(source), torch.bfloat16 if gpu else torch.float32
    calls: dict[tuple[str, int], Callable[[], Any]] = {("copy", 0): lambda: target.copy_(source)}
    for size in (8192,) if gpu else (1024, 2048):
        factor = torch.randn(size, size, device=DEVICE, dtype=dtype)
        calls["matmul", size] = functools.partial(torch.matmul, factor, factor)
        calls["linear", size] = functools.partial(linear, factor, factor)
    clocks = {key: clock(call) for key, call in calls.items()}
    samples = samples_in_turns(clocks, rounds=30)
    best = {key: min(values) for key, values in samples.items()}  # a slow round is no ceiling
    products = (2 * size**3 / seconds for (_, size), seconds in best.items() if size)
    return {
        "copy_gigabytes": 2 * source.numel() / best["copy", 0] / 1e9,
        "matmul_gigaflops": max(products) / 1e9,
    }


class Replay:
    """The clock given to pytest-benchmark: it plays back times taken in turns, so that tables and files show them."""

    def __init__(self) -> None:
        self._sample: float | None = None
        self._started = False

    def load(self, seconds: float) -> None:
        self._sample, self._started = seconds, False

    def __call__(self) -> float:
        if self._sample is None:
            return time.perf_counter()
        if self._started:
            return self._sample
        self._started = True
        return 0.0


REPLAY = Replay()


def main() -> None:
    """Write machine, versions and ceilings to a file: ``python -m benchmarks.harness.contest FILE``."""
    torch.set_num_threads(THREADS)
    content = {"machine": machine(), "versions": versions(), "ceilings": ceilings()}
    with replacing(Path(sys.argv[1])) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    print(content)


if __name__ == "__main__":
    main()
