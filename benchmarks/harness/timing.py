"""Taking times in turns, on the device's own clock where it has one; and the machine they were taken on."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from alit.atomic_files import replacing

_log = logging.getLogger(__name__)
Name = TypeVar("Name")
RESULTS = Path(__file__).parents[1] / "results"


class Clock(NamedTuple):
    """Times one call.

    Attributes:
        kind: "host": wall clock. "graph": the device's clock, kernels alone. "events": the device's clock too, but the
            host's launches count where they take longer than the kernels.
        seconds: calls and times it.
    """

    kind: str
    seconds: Callable[[], float]


def clock(call: Callable[[], Any], seen: Callable[[Any], Any] = lambda result: None) -> Clock:
    """The machine's clock for this call; a GPU's calls it first. ``seen`` gets what timed calls return, outside the
    time; of those in a CUDA graph the tensors of the last, which every replay writes anew.
    """
    if torch.cuda.is_available():
        return _device_clock(call, seen)
    return Clock("host", functools.partial(_host_seconds, call, seen))


#: Rounds that a time limit leaves.
FEWEST = 3


def samples_in_turns(
    clocks: Mapping[Name, Clock], *, rounds: int, warmup: int = 1, limit: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each contender; they run one after another in every round, so that drift hits all alike.

    After ``limit`` seconds no round but the first ``FEWEST`` starts.
    """
    end = time.monotonic() + limit
    times: dict[Name, list[float]] = {name: [] for name in clocks}
    for turn in range(warmup + rounds):
        if turn >= warmup + FEWEST and time.monotonic() > end:
            break
        for name, own in clocks.items():
            elapsed = own.seconds()
            if turn >= warmup:
                times[name].append(elapsed)
    return times


#: Seconds in which the threads of the contender before, which wait by spinning, go to sleep.
PAUSE = 0.02
#: Waking a contender's threads may take milliseconds: a call shorter than this many seconds is called again, and timed
#: then, when they are awake as in the middle of a model.
SHORT_ON_HOST = 0.2


def _host_seconds(call: Callable[[], Any], seen: Callable[[Any], Any]) -> float:
    time.sleep(PAUSE)
    seconds = _elapsed(call, seen)
    return _elapsed(call, seen) if seconds < SHORT_ON_HOST else seconds


def _elapsed(call: Callable[[], Any], seen: Callable[[Any], Any]) -> float:
    seen(None)  # what the call before returned is freed outside the time
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    seen(result)
    return seconds


#: A call of less than this many seconds between events is captured: they may be those of its launches by the host.
SHORT = 5e-3
#: Calls in one CUDA graph.
REPLAYS = 20
#: Bytes that push everything else out of any L2 when they are written.
FLUSH = 2**28


def _device_clock(call: Callable[[], Any], seen: Callable[[Any], Any]) -> Clock:
    """Seconds of ``call`` on the device, with a cold L2.

    Short calls are captured into a CUDA graph, each after a write that empties the cache; the time of a graph of the
    writes alone is taken off. A short call that waits for the device, or cannot be captured, is timed between events.
    """
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    call()

    def once() -> float:
        flush.zero_()
        return _between_events(call, seen)

    if min(once() for _ in range(3)) >= SHORT or _waits(call):
        return Clock("events", once)
    writes = _captured(flush.zero_)

    def flushed() -> Any:
        flush.zero_()
        return call()

    try:
        both = _captured(flushed, seen)
    except RuntimeError as error:
        _log.warning("not captured, timed with its launches: %s", error)
        return Clock("events", once)
    return Clock(
        "graph", lambda: max(_between_events(both) - _between_events(writes), 0.0) / REPLAYS
    )


def _waits(call: Callable[[], Any]) -> bool:
    """Whether a call reads from the device what the host has to wait for. A capture of it would fail, and leave torch's
    allocator and random generator in the state of a capture.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        _log.warning("timed with its launches: %s", error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(
    call: Callable[[], Any], seen: Callable[[Any], Any] = lambda result: None
) -> Callable[[], None]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    # The outer context leaves the stream even where a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(REPLAYS):
            result = call()
    seen(result)
    graph.replay()
    return graph.replay


def _between_events(
    call: Callable[[], Any], seen: Callable[[Any], Any] = lambda result: None
) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seen(None)
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    seen(result)
    return start.elapsed_time(end) / 1e3


class OtherLoad:
    """Within the context, how much of the machine's processors other processes used (Linux; None elsewhere)."""

    percent: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self._start and (end := self._now()):
            total, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
            if total > 0:
                self.percent = max(0.0, 100 * (busy - own) / total)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors, those in which they were busy, and those of this process and its children."""
        file = Path("/proc/stat")
        if not file.exists():
            return None
        ticks = [int(x) for x in file.read_text().splitlines()[0].split()[1:9]]
        times, rate = os.times(), os.sysconf("SC_CLK_TCK")
        own = sum(times[:4])
        for child in multiprocessing.active_children():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # just ended: in times
                fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
                own += (int(fields[11]) + int(fields[12])) / rate
        return sum(ticks) / rate, (sum(ticks) - ticks[3] - ticks[4]) / rate, own


def peak_megabytes(call: Callable[[], Any]) -> float:
    """Memory at the peak of ``call`` beyond what was in use before, output included. Linux or CUDA.

    ``call`` should have run before: what it makes once and keeps would count. On a CPU it is the process's resident
    set, and so includes what the C library's heap cannot use again.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Give back what the allocator keeps, then let the kernel count the resident set's high-water mark anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) * 1024 / 1e6


def _resident(field: str) -> int:
    """Of 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


#: Distributions whose versions a result notes.
PEERS = ("torch", "triton", "faiss-cpu", "flash-kmeans", "vector-quantize-pytorch", "xformers")
PEERS += ("flash-attn",)


def machine() -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    installed = {
        x.name.lower().replace("_", "-"): x.version for x in importlib.metadata.distributions()
    }
    return {
        "cpu": model[1] if model else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed[name] for name in PEERS if name in installed},
    }


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


def write(name: str, results: Mapping[str, Any], part: str = "") -> None:
    """Print a study's results; write ``benchmarks/results/NAME.json``, or ``NAME-PART.json``: also command, machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-{part}.json" if part else f"{name}.json")
    command = " ".join(["python -m", f"benchmarks.studies.{name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "results": results}
    write_json(path, content)
    print(json.dumps(results, indent=1), path, sep="\n")


def rounds(description: str | None, default: int) -> int:
    """``--rounds`` of a study that has no other option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=default)
    return parser.parse_args().rounds
