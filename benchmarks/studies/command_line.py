"""Seconds of the command line from the start of the process: ``python -m benchmarks.studies.command_line``.

``alit --help``, ``alit reconstruct`` of a JPEG of 3000x2000 pixels, and ``alit demo``, with the shipped weights. Every
command runs once unmeasured, so that the files it reads are in the system's cache; then the median of ``--rounds``.
"""

from __future__ import annotations

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

from ..harness.contest import THREADS
from ..harness.timing import rounds, write


def seconds(command: list[str], folder: str) -> float:
    """Wall-clock seconds of one run of a command in ``folder``.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    count, rows = rounds(__doc__, default=5), []
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        photo = to_image(photographs(512)["astronaut"])
        large = photo.resize((3000, 2000), Image.Resampling.LANCZOS)
        large.save(Path(folder, "photo.jpg"), quality=90)
        for arguments, times_each in (
            ("--help", count),
            ("reconstruct photo.jpg", count),
            ("demo", 1),
        ):
            command = [sys.executable, "-m", "alit.cli", *arguments.split()]
            times = [seconds(command, folder) for _ in range(1 + times_each)][1:]
            median, slowest = (round(x, 2) for x in (statistics.median(times), max(times)))
            rows.append(
                {
                    "command": f"alit {arguments}",
                    "rounds": times_each,
                    "seconds": median,
                    "slowest": slowest,
                }
            )
    write("command_line", {"rows": rows})


if __name__ == "__main__":
    main()
