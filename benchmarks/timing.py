"""Taking times in turns, on the device's own clock where it has one; and the machine they were taken on."""

from __future__ import annotations

import ctypes
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each contender."""
    return {
        name: statistics.median(values)
        for name, values in samples_in_turns(contenders, rounds=rounds, warmup=warmup).items()
    }


def samples_in_turns(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender; they run one after another in every round, so that drift hits all alike."""
    clock = _device_seconds if torch.cuda.is_available() else _host_seconds
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            seconds = clock(call)
            if turn >= warmup:
                times[name].append(seconds)
    return times


#: Seconds in which the threads of the contender before, which wait by spinning, go to sleep.
PAUSE = 0.02


def _host_seconds(call: Callable[[], Any]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the time
    return seconds


#: Calls in one CUDA graph where a single one is too short for two events to time.
REPLAYS, SHORT = 20, 100e-6


def _device_seconds(call: Callable[[], Any]) -> float:
    """Time between two events, with a cold L2. Short launches are captured, and the graph's time is divided."""
    seconds = _between_events(call)
    if seconds >= SHORT:
        return seconds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    graph.replay()
    return _between_events(graph.replay) / REPLAYS


def _between_events(call: Callable[[], Any]) -> float:
    # Larger than any L2; what it writes pushes everything else out.
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_megabytes(call: Callable[[], Any]) -> float:
    """Memory at the peak of ``call`` beyond what was in use before, output included; warmed up. Linux or CUDA."""
    call()
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
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine() -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    models = (
        [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, results: Mapping[str, Any], part: str = "") -> Path:
    """``benchmarks/results/NAME.json``, or ``NAME-PART.json``: command, machine, results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-{part}.json" if part else f"{name}.json")
    command = " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
