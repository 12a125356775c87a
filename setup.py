"""Builds the C++ core with CMake and Ninja where a compiler is; without one the package installs in pure Python.

torch is neither needed nor looked at: the core has no torch header.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def compiler() -> str | None:
    """The C++ compiler CMake would find, or None; the core has not been tried on Windows, which installs without."""
    if sys.platform == "win32":
        return None
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name.split()[0]))), None)


def choice(variable: str) -> bool | None:
    """What a variable of the environment says, 0 or 1; None where it is not set."""
    wanted = os.environ.get(variable, "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"{variable}: expected 0 or 1, got {wanted!r}")
    return None if wanted == "" else wanted == "1"


def with_core() -> bool:
    """Whether to build the C++ core: as ALIT_BUILD_CORE (0 or 1) says; unset, where a compiler is."""
    wanted, found = choice("ALIT_BUILD_CORE"), compiler() is not None
    if wanted and not found:
        raise SystemExit("ALIT_BUILD_CORE=1 needs a C++ compiler, and a system other than Windows")
    return found if wanted is None else wanted


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: as ALIT_BUILD_CUDA (0 or 1) says; unset, where nvcc is."""
    wanted, found = choice("ALIT_BUILD_CUDA"), shutil.which("nvcc") is not None
    if wanted and not found:
        raise SystemExit("ALIT_BUILD_CUDA=1 needs nvcc, which is not on the path")
    return found if wanted is None else wanted


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # A fresh directory: CMake would remember the tools of an isolated build environment that is gone.
        with tempfile.TemporaryDirectory() as build:
            configure = [
                *("cmake", "-S", str(ROOT / "csrc"), "-B", build, "-G", "Ninja"),
                f"-DALIT_VERSION={self.distribution.get_version()}",
                f"-DALIT_CUDA={'ON' if with_cuda() else 'OFF'}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPYTHON_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)


# Without the core there is no extension, and the wheel is a pure one, for every Python and system.
CORE = with_core()
if not CORE:
    print("alit_kernels is built without its compiled core", file=sys.stderr)
setup(
    ext_modules=[Extension("alit_kernels._C", sources=[])] if CORE else [],
    cmdclass={"build_ext": CMakeBuild},
)
