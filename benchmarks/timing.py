"""Taking times in turns, and writing them down with the machine they were taken on."""

from __future__ import annotations

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
    """Median seconds of each contender; they run one after another in every round, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, call in contenders.items():
            _synchronize()
            start = time.perf_counter()
            result = call()
            _synchronize()
            elapsed = time.perf_counter() - start
            del result  # freed outside the time
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    }


def write(name: str, results: Mapping[str, Any], part: str = "") -> Path:
    """``benchmarks/results/NAME.json``, or ``NAME-PART.json``: command, machine, results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-{part}.json" if part else f"{name}.json")
    command = " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
