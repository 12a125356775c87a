"""Everything that needs a GPU, in a few minutes: ``python -m benchmarks.harness.gpu --out DIR --minutes 12``.

Parts run in the order of what rests on them: the extension; whether every kernel is right; the bound that the search
rests on; times of ops and their peers; tiles; training steps; encoding and decoding; counters of the hardware; peers
that a compiler writes; compute-sanitizer. Each has a share of the minutes, and what one leaves, the others have.

The output of a part goes to ``DIR/PART.log`` and its outcome to ``DIR/parts.json``. Times are written after every row,
and ``DIR/README.md`` after every part that has some, so a run that is cut off leaves what it has found. The next one,
of the same sources, does what is missing or failed. ``--rehearsal`` runs the same on a CPU, small. The exit status is 1
where a part failed or was left for the next run; a part whose tool is not installed is reported as absent.
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
SUITES = ROOT / "benchmarks" / "suites"
#: What the outcomes of a run depend on.
SOURCES = ("alit", "alit_kernels", "benchmarks", "csrc", "tests", "setup.py")
CODE = (".py", ".cpp", ".cu", ".h")
#: Seconds without which a part is not worth a start, and seconds for the last report.
LEAST, LAST = 20, 10
#: Outcome of a part for which no time is left.
LEFT = "left for the next run"
#: Tests of compilers and emulation, which gain nothing from a GPU.
WITHOUT_GPU = ("test_aot", "test_cuda", "test_extension")
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """A command.

    Attributes:
        share: of all minutes, that it may take.
        tool: runs the command; must be on the path, and allowed.
        results: names of files that the command goes on with where they are there.
        anew: it runs even where it has passed before, since the machine may be another one of its kind.
    """

    name: str
    command: tuple[str, ...]
    share: float = 0.2
    tool: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    anew: bool = False


PYTEST = (PYTHON, "-m", "pytest")
#: Suites in this order, any other one behind them.
FIRST = ("test_codebooks", "test_ragged", "test_soft_codebook", "test_add_layer_norm", "test_mlp")
STEP, MODELS = "test_stage1_step", "test_encode_decode"
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


def all_parts(out: Path, rehearsal: bool) -> list[Part]:
    """In the order in which they run."""
    build = ("-m", "alit_kernels") if rehearsal else ("setup.py", "build_ext", "--inplace")
    # Without the compiled core the ragged ops would be their references.
    extension = Part("extension", (PYTHON, *build), 0.35, anew=True)
    ncu = ("ncu", "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS))
    counters = (PYTHON, "-m", "benchmarks.suites.kernels", *(["--rehearsal"] * rehearsal))
    return [
        extension,
        *correctness(rehearsal),
        *times(out, rehearsal),
        Part("counters", counters, 0.1, () if rehearsal else ncu),
        compiled_peers(out, rehearsal),
        *sanitizers(rehearsal),
    ]


def correctness(rehearsal: bool) -> list[Part]:
    """All kernel tests, graph capture and determinism (``test_device``) among them; those of training steps; and how
    much of the bound of its error the search's products take.
    """
    if rehearsal:
        kernels = [str(TESTS / f"test_{name}.py") for name in ("soft_codebook", "device")]
    else:
        kernels = [str(TESTS), *(f"--ignore={TESTS / name}.py" for name in WITHOUT_GPU)]
    # Minutes of compiling, on all processors; -vv: a run that is cut off has said which tests passed.
    together = ("-vv", "--tb=short", "-n", str(min(14, os.cpu_count() or 1)))
    training = (str(ROOT / "tests" / "alit" / f"test_{x}.py") for x in ("cuda_graph", "stage1"))
    bound = (str(TESTS / "test_nearest_codeword.py"), "-k", BOUND, "-p", "no:randomly")
    return [
        Part("kernels", (*PYTEST, *together, *kernels), 0.4),
        Part("training", (*PYTEST, "-q", *training, "-k", "[cuda or -cuda or on_a_gpu"), 0.15),
        Part("bound", (*PYTEST, "-q", "-rP", *bound), 0.1),
    ]


#: Name of the test that measures the error of the search's products against its bound.
BOUND = "bound"


def suites(rehearsal: bool) -> list[str]:
    """Files of the ops' suites, those that decide most first, the one with most cases last."""
    if rehearsal:
        return [str(SUITES / "test_soft_codebook.py")]
    found = {path.stem for path in SUITES.glob("test_*.py")} - {STEP, MODELS}
    others = sorted(found - {*FIRST, "test_attention"})
    return [str(SUITES / f"{name}.py") for name in (*FIRST, *others, "test_attention")]


def timing(out: Path, rehearsal: bool, name: str, share: float, *options: str) -> Part:
    """A part of ``pytest benchmarks``, whose rows go to ``test_NAME.json``."""
    file = f"test_{name}.json"
    quick = ["--quick"] * rehearsal
    command = (*PYTEST, "-q", *options, f"--rows={out / file}", "--benchmark-quiet", *quick)
    return Part(name, command, share, results=(file,))


def times(out: Path, rehearsal: bool) -> list[Part]:
    """Device, host and launches of every op and every peer that needs no compiler; tiles; the model's paths."""
    step = [f"{SUITES / STEP}.py::{test}" for test in STEPS[: 1 if rehearsal else None]]
    models = f"{SUITES / MODELS}.py" + ("::test_decode" if rehearsal else "")
    small = ("--rehearsal", "--head-dim", "64") if rehearsal else ()
    tuning = []
    for module in sorted(
        f"alit_kernels.{path.parent.name}.tune" for path in KERNELS.glob("*/tune.py")
    ):
        file = f"tiles-{module.split('.')[1]}.json"
        command = (PYTHON, "-m", module, "--json", str(out / file), *small)
        tuning.append(Part(file.removesuffix(".json"), command, 0.2, results=(file,)))
    return [
        timing(out, rehearsal, "ops", 0.3, "--peers=plain", *suites(rehearsal)),
        *tuning,
        timing(out, rehearsal, "step", 0.25, "--peers=plain", *step),
        timing(out, rehearsal, "models", 0.15, models),
    ]


#: Tests of a training step; those of what a compiler writes are not among them.
STEPS = ("test_stage1_step", "test_large_batch", "test_launches_of_a_step")
COMPILED_STEPS = ("test_compiled_step",)


def compiled_peers(out: Path, rehearsal: bool) -> Part:
    """Peers that a compiler writes, beside ours: a minute of compiling for a second of times."""
    step = [] if rehearsal else [f"{SUITES / STEP}.py::{test}" for test in COMPILED_STEPS]
    return timing(out, rehearsal, "compiled", 0.4, "--peers=compiled", *step, *suites(rehearsal))


def sanitizers(rehearsal: bool) -> list[Part]:
    """compute-sanitizer on a small set."""
    small = (*PYTEST, "-q", str(TESTS / "test_device.py"), "-k", "test_same_bits_every_time")
    environment = {"ALIT_TEST_REPEATS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part(
            *(name, small, 0.25),
            () if rehearsal else ("compute-sanitizer", "--tool", name, "--error-exitcode", "1"),
            environment,
        )
        for name in ("memcheck", "racecheck")
    ]


#: What NVIDIA's tools say where the machine lets nobody profile or check.
FORBIDDEN = re.compile(
    r".*(ERR_NVGPUCTRPERM|Failed to initialize the profiler|Device not supported).*"
)


def run(part: Part, log: Path, limit: float, left: float) -> dict[str, Any]:
    """Run a part to its end, or for ``limit`` seconds, or until the seconds that are left have passed."""
    if part.tool and shutil.which(part.tool[0]) is None:
        return {"outcome": "absent", "reason": f"{part.tool[0]} is not installed", "seconds": 0}
    if left < LEAST:
        return {"outcome": LEFT, "seconds": 0}
    limit = round(min(limit, left))
    start = time.monotonic()
    outcome: dict[str, Any]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*part.tool, *part.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
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
    """``README.md`` and plots of the rows that are there; False where that fails."""
    command = [PYTHON, "-m", "benchmarks.harness.report", str(out), "--output", str(out)]
    found = any(out.glob("test_*.json"))
    return not found or subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def run_all(parts: list[Part], out: Path, seconds: float) -> bool:
    """Run what is missing, keep the record, print a line for each part; whether nothing failed or was left."""
    end = time.monotonic() + seconds
    record, now, good = out / "parts.json", revision(), True
    known = json.loads(record.read_text()) if record.exists() else {}
    entries = {
        # The folder may be taken elsewhere.
        x.name: {
            "command": " ".join([*x.tool, *x.command]).replace(str(out), "OUT"),
            "revision": now,
        }
        for x in parts
    }
    same = {name for name, x in entries.items() if x.items() <= known.get(name, {}).items()}
    for part in parts:  # results of other sources must not pass for those of this run
        for file in part.results if part.name not in same else ():
            (out / file).unlink(missing_ok=True)
    for part in parts:
        if part.name in same and not part.anew and known[part.name]["outcome"] == "passed":
            print(f"{part.name}: passed before", flush=True)
            continue
        log = out / f"{part.name}.log"
        # What this process does not live to see ended has been begun.
        known[part.name] = entries[part.name] | {"outcome": "cut off with the run", "seconds": 0}
        write_json(record, known)
        outcome = run(part, log, part.share * seconds, end - time.monotonic())
        found = known[part.name] = entries[part.name] | outcome
        write_json(record, known)
        print(
            f"{part.name}: {found['outcome']} {found.get('reason', '')} {found['seconds']} s",
            flush=True,
        )
        if found["outcome"] not in ("passed", "absent"):
            good = False
            if found["outcome"] != LEFT:
                print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:]))
        if part.results and found["seconds"]:
            good &= write_report(out)
    return write_report(out) and good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--minutes", type=float, default=12, help="after which it stops by itself")
    parser.add_argument("--rehearsal", action="store_true", help="on the CPU, small")
    options = parser.parse_args(arguments)
    if not options.rehearsal and not torch.cuda.is_available():
        raise SystemExit("this interpreter's torch finds no GPU; --rehearsal runs without one")
    # Ended from outside, it ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = all_parts(out, options.rehearsal)
    return 0 if run_all(parts, out, 60 * options.minutes - LAST) else 1


if __name__ == "__main__":
    raise SystemExit(main())
