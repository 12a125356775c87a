"""Everything that needs a GPU, in parts: ``python -m benchmarks.harness.gpu test|report|tune --out DIR``.

Every part is a command with a time limit. Its output goes to ``DIR/PART.log`` and its outcome to ``DIR/parts.json``
when it ends, so a run that is cut off leaves what it has found; the next one, of the same sources, goes on with what
is missing or failed. After eight minutes a run stops by itself. ``report`` writes its tables and plots anew after every
part. ``--rehearsal`` runs the same on a CPU, small. The exit status is 1 where a part failed or was left for the next
run; a part whose tool is not installed is reported as absent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .timing import write_json

ROOT = Path(__file__).resolve().parents[2]
TESTS, KERNELS = ROOT / "tests" / "alit_kernels", ROOT / "alit_kernels"
#: What the outcomes of a run depend on.
SOURCES = ("alit", "alit_kernels", "benchmarks", "csrc", "tests", "setup.py")
CODE = (".py", ".cpp", ".cu", ".h")
#: After which a run stops by itself.
SECONDS = 8 * 60 - 10
#: Seconds without which a part is not worth a start.
LEAST = 20
#: Outcome of a part for which no time is left.
LEFT = "left for the next run"
#: Tests of compilers and emulation, which gain nothing from a GPU.
WITHOUT_GPU = ("test_aot", "test_cuda", "test_extension")
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """A command; ``limit`` in seconds; ``tool``, which must be on the path and allowed, runs the command.

    ``anew``: it runs even where it has passed before, since the machine may be another one of its kind.
    """

    name: str
    command: tuple[str, ...]
    limit: int = 120
    tool: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    anew: bool = False


def extension(rehearsal: bool) -> Part:
    """The compiled core, without which the ragged ops would be their references."""
    build = ("-m", "alit_kernels") if rehearsal else ("setup.py", "build_ext", "--inplace")
    return Part("extension", (PYTHON, *build), 240, anew=True)


def test_parts(out: Path, rehearsal: bool) -> list[Part]:
    """All kernel tests, those of training steps on a GPU, compute-sanitizer on a small set.

    The kernels' tests of graph capture and determinism are ``test_device``.
    """
    pytest = (PYTHON, "-m", "pytest")
    if rehearsal:
        kernels = [str(TESTS / f"test_{name}.py") for name in ("soft_codebook", "device")]
    else:
        kernels = [str(TESTS), *(f"--ignore={TESTS / name}.py" for name in WITHOUT_GPU)]
    # Minutes of compiling, on all processors; -vv: a run that is cut off has said which tests passed.
    together = ("-vv", "--tb=short", "-n", str(min(14, os.cpu_count() or 1)))
    training = (str(ROOT / "tests" / "alit" / f"test_{x}.py") for x in ("cuda_graph", "stage1"))
    parts = [
        extension(rehearsal),
        Part("kernels", (*pytest, *together, *kernels), 300),
        Part("training", (*pytest, "-q", *training, "-k", "[cuda or -cuda or on_a_gpu")),
    ]
    small = (*pytest, "-q", str(TESTS / "test_device.py"), "-k", "test_same_bits_every_time")
    environment = {"ALIT_TEST_REPEATS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("memcheck", "racecheck"):
        sanitizer = ("compute-sanitizer", "--tool", name, "--error-exitcode", "1")
        parts.append(Part(name, small, 180, () if rehearsal else sanitizer, environment))
    return parts


#: Per kernel: how busy the chip and the memory were, bytes, occupancy, and what it waited for.
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "launch__registers_per_thread",
)


def report_parts(out: Path, rehearsal: bool) -> list[Part]:
    """Every suite of benchmarks, and hardware counters of the main kernels."""
    # The training step first, what compiles models and may not fit last: a result is whole or not there.
    step, extra = "test_stage1_step", ("--quick",) if rehearsal else ()
    suites = sorted(path.stem for path in (ROOT / "benchmarks" / "suites").glob("test_*.py"))
    others = ["test_soft_codebook"] if rehearsal else [name for name in suites if name != step]
    last = ("test_launches_of_a_step", "test_compiled_step", "test_large_batch")
    parts = [extension(rehearsal)]
    limits = dict.fromkeys((step, "test_attention", "test_codebooks", "test_large_batch"), 240)
    limits["test_compiled_step"] = 400
    for name in (step, *others, *last):
        file = f"{name}.py" if name in others else f"{step}.py::{name}"
        options = (f"benchmarks/suites/{file}", f"--benchmark-json={out / name}.json", *extra)
        command = (PYTHON, "-m", "pytest", "-q", *options)
        parts.append(Part(name, command, limits.get(name, 120)))
    ncu = ("ncu", "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS))
    kernels = (PYTHON, "-m", "benchmarks.suites.kernels", *(("--rehearsal",) if rehearsal else ()))
    return [*parts, Part("ncu", kernels, 120, () if rehearsal else ncu)]


def tune_parts(out: Path, rehearsal: bool) -> list[Part]:
    """The tuning script of every op that has one."""
    extra = ("--rehearsal",) if rehearsal else ()
    modules = sorted(f"alit_kernels.{p.parent.name}.tune" for p in KERNELS.glob("*/tune.py"))
    return [Part(name, (PYTHON, "-m", name, *extra), 450) for name in modules]


#: What NVIDIA's tools say where the machine lets nobody profile or check.
FORBIDDEN = re.compile(
    r".*(ERR_NVGPUCTRPERM|Failed to initialize the profiler|Device not supported).*"
)


def run(part: Part, log: Path, left: float) -> dict[str, Any]:
    """Run a part to its end or its limit, or until the seconds that are left have passed."""
    if part.tool and shutil.which(part.tool[0]) is None:
        return {"outcome": "absent", "reason": f"{part.tool[0]} is not installed", "seconds": 0}
    limit = min(part.limit, round(left))
    if limit < min(part.limit, LEAST):
        return {"outcome": LEFT, "seconds": 0}
    start = time.monotonic()
    outcome: dict[str, Any]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*part.tool, *part.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            outcome = {"outcome": "passed" if status == 0 else f"failed ({status})"}
        except subprocess.TimeoutExpired:
            outcome = {"outcome": f"cut off after {limit} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    refused = FORBIDDEN.search(log.read_text(errors="replace")) if part.tool else None
    if refused and not outcome["outcome"].startswith("cut off"):
        outcome = {"outcome": "absent", "reason": f"not allowed here: {refused[0]}"}
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def revision() -> str:
    """A hash of the sources, the GPU and torch; outcomes of other ones are not taken over."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    digest = hashlib.sha256(f"{gpu} {torch.__version__}\n".encode())
    for root in (ROOT / name for name in SOURCES):
        files = (x for x in (root, *root.rglob("*")) if x.suffix in CODE and x.is_file())
        for path in sorted(files):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_report(out: Path) -> bool:
    """Tables and plots of the suites that have finished; False where that fails."""
    command = [PYTHON, "-m", "benchmarks.harness.report", str(out), "--output", str(out)]
    finished = any(out.glob("test_*.json"))
    return not finished or subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def run_all(kind: str, parts: list[Part], out: Path, seconds: float = 3600) -> bool:
    """Run what is missing, keep the record, print a line for each part; whether nothing failed or was left."""
    end = time.monotonic() + seconds
    record, now, good = out / "parts.json", revision(), True
    known = json.loads(record.read_text()) if record.exists() else {}
    entries = {x.name: {"command": " ".join([*x.tool, *x.command]), "revision": now} for x in parts}
    done = {
        x.name
        for x in parts
        if not x.anew
        and (entries[x.name] | {"outcome": "passed"}).items()
        <= known.get(f"{kind} {x.name}", {}).items()
    }
    if kind == "report":  # results of other sources must not pass for those of this run
        for file in out.glob("test_*.json"):
            if file.stem not in done:
                file.unlink()
    for part in parts:
        key = f"{kind} {part.name}"
        if part.name in done:
            print(f"{key}: passed before", flush=True)
            continue
        log = out / f"{part.name}.log"
        found = known[key] = entries[part.name] | run(part, log, end - time.monotonic())
        write_json(record, known)
        print(
            f"{key}: {found['outcome']} {found.get('reason', '')} {found['seconds']} s", flush=True
        )
        if found["outcome"] not in ("passed", "absent"):
            good = False
            if found["outcome"] != LEFT:
                print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:]))
        if kind == "report":
            good &= write_report(out)
    return good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.gpu", description=__doc__)
    parser.add_argument("kind", choices=("test", "report", "tune"))
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--rehearsal", action="store_true", help="on the CPU, small")
    options = parser.parse_args(arguments)
    if not options.rehearsal and not torch.cuda.is_available():
        raise SystemExit("this interpreter's torch finds no GPU; --rehearsal runs without one")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = {"test": test_parts, "report": report_parts, "tune": tune_parts}[options.kind]
    good = run_all(options.kind, parts(out, options.rehearsal), out, SECONDS)
    if options.kind == "tune":
        subprocess.run(["git", "--no-pager", "diff", "--", str(KERNELS)], cwd=ROOT, check=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
