"""The machine that times are taken on, what else it does meanwhile, and files of results.

The clock is that of ``alit_kernels._clock``.
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
