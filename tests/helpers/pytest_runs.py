"""Run pytest in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .forks import fork


def run_pytest(
    folder: Path, *arguments: str, at: Path | None = None, **variables: str
) -> tuple[int, str]:
    """Exit status and output of ``pytest``, run in ``at`` or ``folder`` with these environment variables."""
    process = fork(folder / "said", _call, at or folder, variables, *arguments)
    process.join()
    return process.exitcode, (folder / "said").read_text()


def _call(folder: Path, variables: dict[str, str], *arguments: str) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(folder)
    sys.exit(pytest.main(["-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]))
