"""Print why the null CUDA cannot be set up without a download: ``python -m benchmarks.null_cuda.obstacle WHEEL ...``.

Prints nothing if it can be: the tools are installed, and pip finds the wheels on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

TOOLS = ("gcc", "g++", "nvcc", "nm", "readelf")
#: Timeout of pip in seconds: it may have to download a wheel to read its metadata.
PATIENCE = 60


def obstacle(requirements: list[str]) -> str:
    """Reason why the null CUDA cannot be set up here; "" if it can."""
    found = {"nvcc": os.environ.get("CUDACXX")}
    if missing := [tool for tool in TOOLS if not (found.get(tool) or shutil.which(tool))]:
        return f"{', '.join(missing)} not found"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    command, wanted = [*pip, "--quiet", "--report", "-", *requirements], " ".join(requirements)
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"pip did not find {wanted} within {PATIENCE} seconds"
    if told.returncode:
        errors = [line for line in told.stderr.splitlines() if line.startswith("ERROR")]
        return f"pip cannot install {wanted}: {' '.join(errors[:1])}"
    urls = [entry["download_info"]["url"] for entry in json.loads(told.stdout)["install"]]
    remote = [url for url in urls if not url.startswith("file:")]
    return f"it would download {' '.join(remote)}" if remote else ""


if __name__ == "__main__":
    if reason := obstacle(sys.argv[1:]):
        print(reason)
