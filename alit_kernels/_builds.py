"""Ahead-of-time builds of the Triton kernels: launches that are recorded instead of run.

Every op with Triton kernels has ``builds.py`` with ``record(recorder)``: calls of the op's own launching functions on
``meta`` tensors of the dtypes, shapes and options that are shipped. Triton's own binder says what a launch would
compile: types, constants, and which integers and addresses it specializes on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import _chips, _machine_code, _ptx, _ptx_flow, _ptx_integers, _ptx_machine, _triton
from ._machine_code import Expected, Result, read

#: Names of the element types in Triton's signatures.
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
#: Modules that read machine code; their source is part of a result's hash.
READERS = (_chips, _machine_code, _ptx, _ptx_flow, _ptx_integers, _ptx_machine)


@dataclass(frozen=True)
class Build:
    """One kernel as one launch would compile it.

    Attributes:
        kernel: the ``triton.jit`` function.
        label: name in the table: "d=64 bf16 dense".
        architecture: 90 for sm_90.
        signature: argument -> Triton type ("*bf16", "*fp32", "i32", "fp32", "constexpr").
        constants: position of each constant argument, in a tuple -> its value.
        attributes: position of an argument, in a tuple -> what Triton knows of its value.
        options: launch options.
        rare: a further case of a kernel that another build covers; ``--common`` leaves it out.
    """

    kernel: Any
    label: str
    architecture: int
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    expected: Expected
    rare: bool

    @property
    def key(self) -> str:
        """Key of the build in a result file: "module.kernel [label] sm_90"."""
        return (
            f"{self.kernel.__module__}.{self.kernel.__name__} [{self.label}] sm_{self.architecture}"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """Upper-case constants by name, without run-time arguments that Triton made constants."""
        names = self.kernel.arg_names
        return {names[i]: x for (i,), x in self.constants.items() if names[i].isupper()}

    def about(self) -> dict[str, Any]:
        """Fields of a :class:`Result` that need no compilation; the hash is the same on every machine."""
        import triton
        from triton.backends.nvidia.compiler import get_ptxas_version

        decides = (
            *(triton.__version__, get_ptxas_version(self.architecture), self.architecture),
            *(self._source().hash(), sorted(self.options.items()), self.expected),
            *map(inspect.getsource, READERS),
        )
        return {
            "kernel": f"{self.kernel.__module__}.{self.kernel.__name__}",
            "label": self.label,
            "arch": self.architecture,
            "hash": hashlib.sha256(repr(decides).encode()).hexdigest()[:16],
        }

    def compiled(self) -> Any:
        """Compile by Triton and return its compiled kernel; raises what Triton raises where it does not compile."""
        import triton

        target = _target(self.architecture)
        return triton.compile(self._source(), target=target, options=dict(self.options))

    def result(self) -> Result:
        """:class:`Result` read from the machine code, which is compiled here; raises as ``compiled``."""
        return self.read(self.compiled())

    def read(self, compiled: Any) -> Result:
        """:class:`Result` read from the machine code of a compiled kernel, as ``compiled()`` returns it."""
        return read(compiled, self.signature, self.expected, **self.about())

    def _source(self) -> Any:
        from triton.compiler import ASTSource

        return ASTSource(self.kernel, self.signature, dict(self.constants), self.attributes)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what it compiles, its grid, and its arguments and options by name."""

    build: Build
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


class Recorder:
    """Recorder of the launches of kernels of ``package``, or of all packages where it is empty.

    ``builds`` holds each distinct build once, under its first label; ``launches`` holds every launch.
    """

    def __init__(self, package: str, architecture: int) -> None:
        self.package = package
        self.architecture = architecture
        self.builds: dict[str, Build] = {}
        self.launches: list[Launch] = []

    @contextmanager
    def __call__(
        self, label: str, expected: Mapping[str, Expected] | None = None, *, rare: bool = False
    ) -> Iterator[None]:
        """Context manager: record launches under ``label``; ``expected``: kernel -> demands on its machine code."""

        def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
            name, known = kernel.__name__, expected or {}
            if not self.package or kernel.__module__ == f"{self.package}.kernels":
                found = _specialized(kernel, self.architecture, arguments)
                build = Build(
                    kernel, label, self.architecture, *found, known.get(name, Expected()), rare
                )
                build = self.builds.setdefault(repr((name, found)), build)
                self.launches.append(Launch(build, grid, arguments))

        before, _triton.target = _triton.target, self.architecture
        try:
            with _triton.recorded(record):
                yield
        finally:
            _triton.target = before


def _specialized(
    kernel: Any, architecture: int, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any], dict[str, Any]]:
    """Signature, constants, attributes and options of a launch, as Triton sees it."""
    backend, bind = _binder(kernel, architecture)
    bound, specialization, options = bind(**arguments)
    _, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return signature, constants, attributes, options


@functools.cache
def _binder(kernel: Any, architecture: int) -> tuple[Any, Any]:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(architecture))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _target(architecture: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", architecture, 32)


def builds(package: str, architecture: int) -> list[Build]:
    """All builds of an op's package, "alit_kernels.attention", for an architecture."""
    recorder = Recorder(package, architecture)
    importlib.import_module(f"{package}.builds").record(recorder)
    return list(recorder.builds.values())
