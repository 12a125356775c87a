"""Seconds of the command line from the start of the process: ``python -m benchmarks.studies.command_line``.

``alit --help``, ``alit reconstruct`` of a JPEG of 3000x2000 pixels, and ``alit demo``, with the shipped weights. Every
command runs once unmeasured, so that the files it reads are in the system's cache; then the median of ``--rounds``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from alit.demo import photographs
from alit.images import to_image

from ..harness.timing import write


def seconds(command: list[str], folder: Path) -> float:
    """One run, which has to succeed.

    Raises:
        subprocess.CalledProcessError: it did not.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    alit, rows = [sys.executable, "-m", "alit.cli"], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = to_image(photographs(512)["astronaut"]).resize(
            (3000, 2000), Image.Resampling.LANCZOS
        )
        photo.save(folder / "photo.jpg", quality=90)
        for arguments, rounds in (
            (["--help"], options.rounds),
            (["reconstruct", "photo.jpg"], options.rounds),
            (["demo"], 1),
        ):
            times = [seconds([*alit, *arguments], folder) for _ in range(1 + rounds)][1:]
            rows.append(
                {
                    "command": " ".join(["alit", *arguments]),
                    "rounds": rounds,
                    "seconds": round(statistics.median(times), 2),
                    "slowest": round(max(times), 2),
                }
            )
            print(rows[-1])
    print(write("command_line", {"rows": rows}))


if __name__ == "__main__":
    main()
