"""Description of the timing machine, load by other processes, peak memory, and writers of result files.

Clocks are in ``alit_kernels._clock``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from alit.atomic_files import replacing

RESULTS = Path(__file__).parents[1] / "results"


class OtherLoad:
    """Context manager: ``percent`` of the processors that other processes used within it (Linux; None elsewhere)."""

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
        """Processor seconds since boot: all, busy, and those of this process with its children; None without /proc."""
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
    """Peak memory of ``call`` in MB beyond what was in use before, output included. Linux or CUDA.

    Call ``call`` once before: allocations that it keeps would count. On a CPU the resident set of the process is
    measured, which includes heap memory that the C library cannot reuse.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Return free heap memory to the system, then reset the resident set's high-water mark.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) * 1024 / 1e6


def _resident(field: str) -> int:
    """Field of ``/proc/self/status``, in units of 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


#: Distributions whose versions a result file holds.
PEERS = ("torch", "triton", "faiss-cpu", "flash-kmeans", "vector-quantize-pytorch", "xformers")
PEERS += ("flash-attn",)


def machine() -> dict[str, Any]:
    """Processor, GPU, threads, versions and date: what times depend on."""
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
    """Print a study's results; write them with command and machine to ``results/NAME.json`` or ``NAME-PART.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-{part}.json" if part else f"{name}.json")
    command = " ".join(["python -m", f"benchmarks.studies.{name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "results": results}
    write_json(path, content)
    print(json.dumps(results, indent=1), path, sep="\n")


def rounds(description: str | None, default: int) -> int:
    """Value of ``--rounds``, parsed from the command line of a study without other options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=default)
    return parser.parse_args().rounds
