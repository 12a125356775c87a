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


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: as ALIT_BUILD_CUDA (0 or 1) says; unset, where nvcc is."""
    wanted = os.environ.get("ALIT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"ALIT_BUILD_CUDA: expected 0 or 1, got {wanted!r}")
    found = shutil.which("nvcc") is not None
    if wanted == "1" and not found:
        raise SystemExit("ALIT_BUILD_CUDA=1 needs nvcc, which is not on the path")
    return wanted == "1" or (wanted == "" and found)


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        if compiler() is None:
            self.warn("no C++ compiler found: installing alit_kernels without its compiled core")
            return
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

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]


setup(
    ext_modules=[Extension("alit_kernels._C", sources=[], optional=compiler() is None)],
    cmdclass={"build_ext": CMakeBuild},
)
