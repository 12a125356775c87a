"""CUDA kernels compiled for the CPU through csrc/launch.h, called by the same Python code as on a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from alit_kernels import _cuda, _library

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
NO_COMPILER = "needs g++, which compiles CUDA kernels for the CPU"


class Emulated:
    """Library of the emulated entry points ``alit_cuda_*``, functions of integers that return an integer."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64 if name.endswith("blocks") else ctypes.c_int
        return lambda *arguments: function(*map(ctypes.c_int64, arguments))


@functools.cache
def library() -> Emulated:
    """The emulated library, compiled once a session."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        sources = [str(source) for source in sorted(CSRC.glob("*/*.cu"))]
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-x", "c++"]
        subprocess.run([COMPILER, *options, *sources, "-o", str(path)], check=True)
        return Emulated(path)


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Context manager: ``implementation="cuda"`` runs on CPU tensors, emulated."""
    available = _library.available
    with (
        mock.patch.object(_cuda, "library", library),
        mock.patch.object(
            _library,
            "available",
            lambda name, device: (
                "" if (name, device) == ("cuda", "cpu") else available(name, device)
            ),
        ),
    ):
        yield
