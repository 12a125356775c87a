"""Registration of ops, and the choice between their implementations.

Every op is one ``torch.library`` schema whose last argument is the string ``implementation``. One Python kernel serves
all devices and looks the implementation up in the op's table; nothing is registered under CPU or CUDA keys, so the
reference stays reachable everywhere. A backward is an op built the same way. An op without one raises when a gradient
is asked for: autograd never looks into a reference. ``_dispatch.py`` describes how a call gets here.

The public functions check shapes, dtypes and devices. The operators in ``torch.ops.alit_kernels``, which compiled and
exported graphs hold, take what these let through, and check nothing themselves but values on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launcher, _plans
from ._calls import requested
from ._checks import autocast_dtype
from ._core import extension
from ._dispatch import Operator

logger = logging.getLogger("alit_kernels")

#: Implementations that ``auto`` tries on each device type, in this order, before the reference, which runs anywhere.
#: "torch" is a fused operator of PyTorch itself, where one does the work of a kernel of ours.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda")}
#: Least compute capability of the Triton and CUDA kernels: older GPUs have no tensor cores for their types, or
#: less shared memory than they take.
LEAST_CAPABILITY = (8, 0)


class _Known(NamedTuple):
    """Entry remembered for a signature: implementation, device type, plan or None, positions of tensor arguments."""

    function: Callable[..., Any]
    device: str
    plan: Any
    tensors: tuple[int, ...]


class Op(Operator):
    """One op: its schema, its table of implementations and the kernel that looks the table up.

    Args:
        schema: ``name(arguments) -> returns``, without the ``implementation`` argument, which is appended.
        reference: the plain PyTorch implementation; it defines the op.
        fake: shapes and dtypes of the outputs; takes the op's arguments without ``implementation``.
        check: called with the op's arguments before any implementation, only where looking at the values costs no
            synchronization (all tensors on the CPU). Raises ``ValueError``.
        others: name -> ``"module:function"``, imported on first use, or the function itself.
        limits: name -> function of the op's arguments that says why the implementation cannot take them; empty if it
            can. Looks at shapes and options, never at values.
        problem: a named tuple class; its method ``of`` gathers the first arguments, as many as it has fields.
            Implementations and all of these functions take it in place of those arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
        others: Mapping[str, str | Callable[..., Any]] | None = None,
        limits: Mapping[str, Callable[..., str]] | None = None,
        problem: Any = None,
    ) -> None:
        super().__init__(
            schema.replace(") ->", ", str implementation) ->", 1),
            lambda *arguments: fake(*self._grouped(arguments[:-1])),
        )
        self._table: dict[str, str | Callable[..., Any]] = {
            "reference": reference,
            **(others or {}),
        }
        self._check, self._limits, self._problem = check, limits or {}, problem
        _OPS[self.name] = self

    def __call__(self, *arguments: Any, implementation: str = "auto") -> Any:
        found = None
        if not torch.compiler.is_compiling():
            found = self.calls(*arguments, implementation)
        return self.call(*arguments, requested(implementation)) if found is None else found

    def _grouped(self, values: Sequence[Any]) -> Sequence[Any]:
        """The op's arguments as implementations take them."""
        if self._problem is None:
            return values
        size = len(self._problem._fields)
        return self._problem.of(*values[:size]), *values[size:]

    def run_known(self, *arguments: Any) -> Any:
        *values, _, known = arguments
        if known.plan is not None:
            result = known.plan(*[values[i] for i in known.tensors])
            if result is not None:
                return result
        grouped = self._grouped(values)
        if self._check is not None and known.device == "cpu":
            self._check(*grouped)
        return _without_autocast(known.device, known.function, grouped)

    def _run(self, key: bytes | None, *arguments: Any) -> Any:
        """Results of a call whose signature is not known; remembered by its ``key`` unless that is None."""
        *values, requested = arguments
        grouped = self._grouped(values)
        tensors = [value for value in values if isinstance(value, Tensor)]
        if self._check is not None and all(tensor.is_cpu for tensor in tensors):
            self._check(*grouped)
        device = tensors[0].device.type
        dtypes = [tensor.dtype for tensor in tensors]
        dtype = torch.float64 if torch.float64 in dtypes else dtypes[0]
        name = self.choose(requested, device, dtype, grouped)
        function = self._load(name)
        if name != "reference" and not all(map(_is_aligned, tensors)):
            copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
            grouped, key = self._grouped(copies), None
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"alit_kernels::{self.name}[{name}]"):
                return _without_autocast(device, function, grouped)
        if key is None:
            return _without_autocast(device, function, grouped)
        places = tuple(i for i, value in enumerate(values) if isinstance(value, Tensor))
        plan = None
        if name in ("triton", "cuda") and device == "cuda" and _launcher.enabled():
            watched = partial(_plans.watched, function, grouped, tensors)
            result, plan = _without_autocast(device, watched, ())
        else:
            result = _without_autocast(device, function, grouped)
        self.calls.add(key, plan, _Known(function, device, plan, places), arguments, None)
        return result

    def choose(
        self, requested: str, device: str, dtype: torch.dtype, values: Sequence[Any] = ()
    ) -> str:
        """Name of the implementation that runs for ``requested`` on this device type, dtype and arguments.

        Raises:
            ValueError: ``requested`` is unknown, or names an implementation that this op has not or that cannot run.
        """
        if requested != "auto":
            reason = self._obstacle(requested, device, dtype, values)
            if reason:
                raise ValueError(
                    f"implementation={requested!r} of alit_kernels.{self.name} cannot run: {reason}"
                )
            return requested
        for name in PREFERENCE.get(device, ()):
            if not self._obstacle(name, device, dtype, values):
                break
        else:
            name = "reference"
        _log_once(self.name, name, device)
        return name

    def _obstacle(self, name: str, device: str, dtype: torch.dtype, values: Sequence[Any]) -> str:
        """Reason why the implementation cannot run here; empty if it can."""
        if name not in self._table:
            return f"this op has only {', '.join(self._table)}, and 'auto'"
        if name == "reference":
            return ""
        if dtype == torch.float64:
            return "float64 runs only in the reference"
        reason = available(name, device)
        limit = self._limits.get(name)
        return reason if reason or limit is None or not values else limit(*values)

    def _load(self, name: str) -> Callable[..., Any]:
        entry = self._table[name]
        if isinstance(entry, str):
            module, _, function = entry.partition(":")
            entry = self._table[name] = getattr(importlib.import_module(module), function)
        return entry


_OPS: dict[str, Op] = {}


def ops() -> Mapping[str, Op]:
    """All ops by name, backward ops included."""
    return _OPS


@functools.cache
def available(name: str, device: str) -> str:
    """Reason why implementation ``name`` cannot run on ``device`` on this machine; empty if it can."""
    needed = "cuda" if name == "cuda" else "cpu"
    if name != "triton" and device != needed:
        return f"{name!r} needs {needed.upper()} tensors, got {device}"
    if name == "cpp" and extension() is None:
        _warn_of_a_source_folder()
        return "the compiled extension alit_kernels._C is not installed"
    if name == "cuda" and (extension() is None or not extension().build_info()["cuda"]):
        return "alit_kernels._C was built without CUDA"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return _unfit_gpu()
    if (name, device) == ("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
        return "'triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors"
    return ""


def _unfit_gpu() -> str:
    """Reason why a GPU that torch sees cannot run the kernels; empty if all can, or there is none."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    for i in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < LEAST_CAPABILITY:
            return (
                f"the kernels need GPUs of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later,"
                f" and {torch.cuda.get_device_name(i)} is older"
            )
    return ""


def _warn_of_a_source_folder() -> None:
    """Warn where a clone on the path hides the package that was installed from it, with its compiled core."""
    folder = Path(__file__).parents[1]
    if (folder / "csrc").is_dir():
        warnings.warn(
            f"alit_kernels is imported from the source folder {folder}, which has no compiled core (alit_kernels._C):"
            " ops run their slow reference on the CPU. Build it there with 'pip install -e .', which needs a C++"
            " compiler, or start Python in another folder to use an installed package",
            stacklevel=2,
        )


@functools.cache
def _log_once(op: str, implementation: str, device: str) -> None:
    logger.info("alit_kernels.%s runs its %s implementation on %s", op, implementation, device)


def _without_autocast(device: str, function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Result of ``function(*values)`` with autocast off, whose dtypes the public function has settled already."""
    if autocast_dtype(device) is None:
        return function(*values)
    torch.set_autocast_enabled(device, False)
    try:
        return function(*values)
    finally:
        torch.set_autocast_enabled(device, True)


def _is_aligned(tensor: Tensor) -> bool:
    """True if the address is a multiple of the element size; not so for a view into bytes that begins within one."""
    return tensor.data_ptr() % tensor.element_size() == 0
