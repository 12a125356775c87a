"""Registration of ops, and the choice between their implementations.

Every op is one ``torch.library`` schema whose last argument is the string ``implementation``. One Python kernel serves
all devices and looks the implementation up in the op's table; nothing is registered under CPU or CUDA keys, so the
reference stays reachable everywhere. A backward is an op built the same way. An op without one raises when a gradient
is asked for: autograd never looks into a reference.

Short sequences make short kernels, so the host has to be quick too. A call that nothing traces, transforms or profiles
goes around torch's dispatcher, whose way through Python takes longer than many of the kernels.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import autocast_dtype

logger = logging.getLogger("alit_kernels")

#: "torch" is a fused operator of PyTorch itself, where one does the work of a kernel of ours.
IMPLEMENTATIONS = ("reference", "cpp", "torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "ALIT_KERNELS_IMPLEMENTATION"
#: What ``auto`` tries on each device type, in this order; the reference runs anywhere.
PREFERENCE = {"cpu": ("cpp", "torch", "reference"), "cuda": ("triton", "cuda", "reference")}
#: Compute capability from which the Triton and CUDA kernels run: older GPUs have no tensor cores for their types, or
#: less shared memory than they take.
LEAST_CAPABILITY = (8, 0)


class Op:
    """One op: its schema, its table of implementations and the kernel that looks the table up.

    Args:
        schema: ``name(arguments) -> returns``, without the ``implementation`` argument, which is appended.
        reference: the plain PyTorch implementation; it defines the op.
        fake: shapes and dtypes of the outputs; takes the op's arguments without ``implementation``.
        check: called with the op's arguments before any implementation, only where looking at the values costs no
            synchronisation (all tensors on the CPU). Raises ``ValueError``.
        others: name -> ``"module:function"``, imported on first use, or the function itself.
        limits: name -> function of the op's arguments that says why the implementation cannot take them; empty if it
            can. Looks at shapes and options, never at values.
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
    ) -> None:
        self.name, _, rest = schema.partition("(")
        self.qualified_name = f"alit_kernels::{self.name}"
        self._table: dict[str, str | Callable[..., Any]] = {
            "reference": reference,
            **(others or {}),
        }
        self._check = check
        self._limits = limits or {}
        self._function: type[torch.autograd.Function] | None = None
        self._transformable = self._new_transformable(lambda *_: None, self._refuse_gradient)
        self._op = torch.library.custom_op(
            self.qualified_name,
            self._run,
            mutates_args=(),
            schema="(" + rest.replace(") ->", ", str implementation) ->", 1),
        )
        torch.library.register_fake(self.qualified_name, lambda *arguments: fake(*arguments[:-1]))
        torch.library.register_vmap(self.qualified_name, self._refuse_vmap)
        _OPS[self.name] = self

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """Make the op differentiable; ``backward`` calls backward ops; ``implementation`` gets no gradient."""

        def whole_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return (*backward(ctx, *grads), None)

        def forward(ctx: Any, *arguments: Any) -> Any:
            outputs = self._run(*arguments)
            setup_context(ctx, arguments, outputs)
            return outputs

        torch.library.register_autograd(
            self.qualified_name, whole_backward, setup_context=setup_context
        )
        self._function = self._new_function(forward=forward, backward=whole_backward)
        self._transformable = self._new_transformable(setup_context, whole_backward)

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of the implementations this op has, installed or not."""
        return tuple(self._table)

    def __call__(self, *arguments: Any, implementation: str = "auto") -> Any:
        _refuse_forward_mode(self.name, arguments)
        arguments = (*arguments, _requested(implementation))
        if torch.compiler.is_compiling():
            return self._op(*arguments)
        if _observed(arguments):
            return self._observed_call(arguments)
        if not torch.is_grad_enabled() or not _any_requires_grad(arguments):
            return self._run(*arguments)
        return self._op(*arguments) if self._function is None else self._function.apply(*arguments)

    def _observed_call(self, arguments: tuple[Any, ...]) -> Any:
        if any(isinstance(x, Tensor) and _is_batched(x) for x in arguments):
            self._refuse_vmap()
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Grad:
            return self._transformable.apply(*arguments)
        return self._op(*arguments)

    def _below_transforms(self, *arguments: Any) -> Any:
        """The call with torch.func's wrappers taken off; modes and tensors of other types may still be there."""
        return self._op(*arguments) if transformed(arguments) else self._run(*arguments)

    def _run(self, *arguments: Any) -> Any:
        *values, requested = arguments
        tensors = [value for value in values if isinstance(value, Tensor)]
        if self._check is not None and all(tensor.device.type == "cpu" for tensor in tensors):
            self._check(*values)
        device = tensors[0].device.type
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        name = self.choose(requested, device, torch.float64 if double else tensors[0].dtype, values)
        function = self._load(name)
        if name != "reference":
            values = [_aligned(value) if isinstance(value, Tensor) else value for value in values]
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"alit_kernels::{self.name}[{name}]"):
                return _without_autocast(device, function, values)
        return _without_autocast(device, function, values)

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
        for name in PREFERENCE.get(device, ("reference",)):
            if not self._obstacle(name, device, dtype, values):
                _log_once(self.name, name, device)
                return name
        raise AssertionError("unreachable: the reference runs anywhere")

    def _obstacle(self, name: str, device: str, dtype: torch.dtype, values: Sequence[Any]) -> str:
        """Why the implementation cannot run here; empty if it can."""
        if name not in IMPLEMENTATIONS:
            return f"expected 'auto' or one of {', '.join(self._table)}"
        if name not in self._table:
            return f"this op has only {', '.join(self._table)}"
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

    def _new_function(self, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
        name, bases = f"alit_kernels.{self.name}", (torch.autograd.Function,)
        return type(name, bases, {name: staticmethod(each) for name, each in methods.items()})

    def _new_transformable(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        """The form that torch.func takes; it costs the host half as much again."""
        return self._new_function(
            forward=self._below_transforms,
            setup_context=setup_context,
            backward=lambda ctx, *grads: backward(_Unwrapped(ctx), *grads),
            vmap=self._refuse_vmap,
        )

    def _refuse_gradient(self, *_: Any) -> Any:
        raise NotImplementedError(f"alit_kernels.{self.name} has no derivative")

    def _refuse_vmap(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"alit_kernels.{self.name} does not support torch.vmap; add a batch dimension instead"
        )


class _Unwrapped:
    """A backward's context whose saved tensors have lost the wrappers of transforms that have ended."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        unwrapped = torch._C._functorch.unwrap_if_dead
        return tuple(None if x is None else unwrapped(x) for x in self._ctx.saved_tensors)


_OPS: dict[str, Op] = {}


def ops() -> Mapping[str, Op]:
    """All ops by name, backward ops included."""
    return _OPS


@functools.cache
def available(name: str, device: str) -> str:
    """Why implementation ``name`` cannot run on ``device`` on this machine; empty if it can."""
    if name == "cpp":
        if device != "cpu":
            return f"'cpp' needs CPU tensors, got {device}"
        if extension() is not None:
            return ""
        _warn_of_a_source_folder()
        return "the compiled extension alit_kernels._C is not installed"
    if name == "torch":
        return "" if device == "cpu" else f"'torch' needs CPU tensors, got {device}"
    if name == "cuda":
        if device != "cuda":
            return f"'cuda' needs CUDA tensors, got {device}"
        core = extension()
        if core is None or not core.build_info()["cuda"]:
            return "alit_kernels._C was built without CUDA"
        return _unfit_gpu()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda":
        return _unfit_gpu()
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "'triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors"
    return ""


def _unfit_gpu() -> str:
    """Why a GPU that torch sees is not one that the kernels are written for; empty if all are, or there is none."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    for i in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(i) < LEAST_CAPABILITY:
            return (
                f"the kernels need GPUs of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later,"
                f" and {torch.cuda.get_device_name(i)} is older"
            )
    return ""


@functools.cache
def extension() -> Any:
    """The compiled core ``alit_kernels._C``, or None where it is not installed.

    Raises:
        ImportError: the extension is there but broken: a fallback would hide it.
    """
    try:
        return importlib.import_module("alit_kernels._C")
    except ModuleNotFoundError as error:
        if error.name not in ("alit_kernels._C", None):
            raise
        return None


def _warn_of_a_source_folder() -> None:
    """A clone on the path hides the package that was installed from it, with its compiled core."""
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


def _observed(arguments: tuple[Any, ...]) -> bool:
    """Whether something looks at the call that has to see an op of torch's."""
    return torch.autograd._profiler_enabled() or transformed(arguments)


def transformed(arguments: tuple[Any, ...]) -> bool:
    """Whether a call has to be one of torch's operators: under a mode or a transform, or with a tensor of another type,
    without data or with a sign still to be applied.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
        or any(
            isinstance(x, Tensor)
            and (
                type(x) not in _PLAIN
                or x.is_meta
                or x.is_neg()
                or x._is_zerotensor()
                or _is_batched(x)
            )
            for x in arguments
        )
    )


_PLAIN = (Tensor, torch.nn.Parameter)
#: Whether a tensor is one of those that ``is_grads_batched`` and the like make of many.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _any_requires_grad(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _without_autocast(device: str, function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Dtypes are settled by the public function: autocast must not change products inside the op."""
    if autocast_dtype(device) is None:
        return function(*values)
    torch.set_autocast_enabled(device, False)
    try:
        return function(*values)
    finally:
        torch.set_autocast_enabled(device, True)


def _aligned(tensor: Tensor) -> Tensor:
    """Views into bytes may begin in the middle of an element."""
    size = tensor.element_size()
    return tensor if size == 1 or tensor.data_ptr() % size == 0 else tensor.clone()


def _requested(implementation: str) -> str:
    if not isinstance(implementation, str):
        raise TypeError(f"implementation: expected a string, got {type(implementation).__name__}")
    if implementation != "auto":
        return implementation
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


# What torch.compiler.assume_constant_result does, without its import of the compiler: half the time of `import alit`.
_requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_forward_mode(name: str, arguments: tuple[Any, ...]) -> None:
    if torch.autograd.forward_ad._current_level < 0:
        return
    for argument in arguments:
        if (
            isinstance(argument, Tensor)
            and torch.autograd.forward_ad.unpack_dual(argument).tangent is not None
        ):
            raise NotImplementedError(
                f"alit_kernels.{name} does not support forward-mode differentiation"
            )
