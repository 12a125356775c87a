"""Check that host times are of the present sources: ``python -m benchmarks.null_cuda.sources --compare FILE``.

Needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources() -> str:
    """Hash of the sources that host times depend on: 16 hexadecimal digits."""
    files = [p for name in ("alit_kernels", "csrc") for p in sorted((ROOT / name).rglob("*"))]
    files = [p for p in files if p.suffix in (".py", ".h", ".cpp", ".cu", ".c")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_cuda.sources")
    parser.add_argument("--compare", type=Path, required=True, help="a result of 'make host'")
    path = parser.parse_args().compare
    measured, present = json.loads(path.read_text())["sources"], sources()
    if measured != present:
        raise SystemExit(
            f"{path} is of sources {measured}, alit_kernels and csrc are {present}: measure with 'make host'"
        )


if __name__ == "__main__":
    main()
