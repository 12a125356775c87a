"""Run everything that needs a GPU, in a few minutes: ``python -m benchmarks.harness.gpu --out DIR --minutes 12``.

The most important parts run first: the extension; correctness of every kernel; the error bound of the search; times of
ops and their peers; tiles; training steps; encoding and decoding; hardware counters; compiled peers;
compute-sanitizer. Each has a share of the minutes; minutes that one part leaves go to the others.

The output of a part goes to ``DIR/PART.log`` and its outcome to ``DIR/parts.json``. Times are written after every row,
and ``DIR/README.md`` after every part with times, so a run that is cut off keeps its results. The next run with the
same sources runs the parts that are missing or failed. ``--rehearsal`` runs the same on a CPU, small. The exit status
is 1 if a part failed or was left for the next run; a part whose tool is not installed is reported as absent.
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
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .parts import PYTHON, ROOT, Part, all_parts
from .timing import write_json

#: Files and folders whose content the outcomes of a run depend on.
SOURCES = ("alit", "alit_kernels", "benchmarks", "csrc", "tests", "setup.py")
CODE = (".py", ".cpp", ".cu", ".h")
#: Fewest seconds left with which a part is started, and seconds kept for the last report.
LEAST, LAST = 20, 10
#: Outcome of a part for which no time is left.
LEFT = "left for the next run"


#: Messages of NVIDIA's tools on machines that forbid profiling or checking.
FORBIDDEN = re.compile(
    r".*(ERR_NVGPUCTRPERM|Failed to initialize the profiler|Device not supported).*"
)


def run(part: Part, log: Path, limit: float, left: float) -> dict[str, Any]:
    """Run a part for at most ``limit`` and ``left`` seconds; returns its outcome, seconds, and the reason if absent."""
    if part.tool and shutil.which(part.tool[0]) is None:
        return {"outcome": "absent", "reason": f"{part.tool[0]} is not installed", "seconds": 0}
    if left < LEAST:
        return {"outcome": LEFT, "seconds": 0}
    limit = round(min(limit, left))
    start = time.monotonic()
    outcome: dict[str, Any]
    # torch writes compiled code in place: a part that is cut off would leave incomplete files to the next one.
    with log.open("w") as file, tempfile.TemporaryDirectory() as compiled:
        own = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": compiled}
        process = subprocess.Popen(
            [*part.tool, *part.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **own, **part.environment},
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
    """Hash of the sources, the GPU's name and torch's version; only outcomes with the same hash are reused."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    digest = hashlib.sha256(f"{gpu} {torch.__version__}\n".encode())
    for root in (ROOT / name for name in SOURCES):
        files = (x for x in (root, *root.rglob("*")) if x.suffix in CODE and x.is_file())
        for path in sorted(files):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_report(out: Path) -> bool:
    """Write ``README.md`` and plots of the rows measured so far; returns False if that fails."""
    command = [PYTHON, "-m", "benchmarks.harness.report", str(out), "--output", str(out)]
    found = any(out.glob("test_*.json"))
    return not found or subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def run_all(parts: list[Part], out: Path, seconds: float) -> bool:
    """Run the missing parts, record and print their outcomes; returns False if one failed or was left."""
    end = time.monotonic() + seconds
    record, now, good = out / "parts.json", revision(), True
    known = json.loads(record.read_text()) if record.exists() else {}
    entries = {
        # The folder may be moved: commands are recorded without its path.
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
        # If this process is killed, the record says that the part was begun.
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
        ran = found["outcome"] not in ("absent", LEFT)
        if ran and any(file.endswith(".json") for file in part.results):
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
    # SIGTERM exits by an exception, so that the running part is killed too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = all_parts(out, options.rehearsal)
    return 0 if run_all(parts, out, 60 * options.minutes - LAST) else 1


if __name__ == "__main__":
    raise SystemExit(main())
