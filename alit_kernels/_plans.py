"""Plans: the host work of an implementation, done once for each signature of its arguments.

Checks, the choice of tiles, strides, the grid: all follow from shapes, types and numbers. An implementation that only
allocates, takes views and launches kernels, Triton's or the extension's, is watched once, and from then on its
allocations and launches are repeated with the addresses of other tensors: one call of the core
(``csrc/launcher/plan.cpp``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _cuda, _launcher, _triton
from ._core import extension


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


# Functions that the code of torch.compile calls, which bypass the dispatcher.
_guards = torch._C._dynamo.guards
#: (size, stride, dtype) -> uninitialized tensor on the current device.
_empty = getattr(_guards, "_empty_strided_cuda", _empty_strided)
#: (tensor, size, stride, offset) -> view.
_view = getattr(_guards, "_reinterpret_tensor", torch.as_strided)
_aten = torch.ops.aten
_ALLOCATIONS = {
    *(_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}
_VIEWS = {
    *(_aten.view.default, _aten.view.dtype, _aten._unsafe_view.default, _aten.alias.default),
    *(_aten.as_strided.default, _aten.select.int, _aten.slice.Tensor, _aten.unbind.int),
    *(_aten.transpose.int, _aten.t.default, _aten.permute.default, _aten.unsqueeze.default),
    *(_aten.squeeze.dim, _aten.detach.default, _aten.expand.default),
}


class _Watch(TorchDispatchMode):
    """Dispatch mode that collects allocations, and notes any operator but these and views (``other``)."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.other = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.allocated.append(result)
        elif function not in _VIEWS:
            self.other = True
        return result


def watched(
    function: Callable[..., Any], values: Sequence[Any], tensors: Sequence[Tensor | None]
) -> tuple[Any, Any]:
    """The function's result, and the plan that repeats it, or None where the function does more than a plan can.

    Args:
        values: the function's arguments.
        tensors: the tensors among them, in the order in which the plan will be given others.
    """
    launches: list[tuple[Any, ...]] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append(
            (kernel, grid, arguments, _triton.through_triton(kernel, grid, **arguments))
        )

    def note(name: str, arguments: _cuda.Arguments) -> None:
        launches.append((name, arguments))

    watch = _Watch()
    with _triton.recorded(record), _cuda.recorded(note), watch:
        result = function(*values)
    return result, None if watch.other else _plan(tensors, watch.allocated, launches, result)


def _plan(
    tensors: Sequence[Tensor | None],
    allocated: list[Tensor],
    launches: list[tuple[Any, ...]],
    result: Any,
) -> Any:
    results = [result] if isinstance(result, Tensor) else list(result)
    where = [_result(each, allocated) for each in results]
    first = tensors[0]
    if first is None or None in where:
        return None
    buffers = [*tensors, *allocated]
    device, runtime = first.device.index, None
    prepared = []
    for launch in launches:
        if isinstance(launch[0], str):
            name, arguments = launch
            entry = _prepared_call(name, arguments, device, buffers)
        else:
            kernel, grid, arguments, compiled = launch
            entry = _prepared(kernel, grid, arguments, compiled, buffers)
            from triton import knobs

            runtime = knobs.runtime
        if entry is None:
            return None
        prepared.append(entry)
    return extension().Plan(
        launches=prepared,
        device=device,
        runtime=runtime,
        empty=_empty,
        view=_view,
        allocations=[(tuple(t.shape), t.stride(), t.dtype) for t in allocated],
        results=where,
        alone=isinstance(result, Tensor),
    )


def _result(tensor: Tensor, allocated: Sequence[Tensor]) -> int | tuple[Any, ...] | None:
    """Index of the allocation that a result is, or (index, size, stride, offset) of its view; None if neither."""
    for i, each in enumerate(allocated):
        if tensor is each:
            return i
        if (
            tensor.dtype == each.dtype
            and tensor.numel()
            and tensor.untyped_storage().data_ptr() == each.untyped_storage().data_ptr()
        ):
            return i, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return None


def _prepared(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    compiled: Any,
    buffers: Sequence[Tensor | None],
) -> tuple[Any, ...] | None:
    """A launch as the core takes it; None where the core cannot repeat it."""
    names = tuple(arguments)
    found = None if compiled is None else _launcher.plan(kernel, compiled, names)
    if found is None:
        return None
    function, threads, shared, order = found
    given = list(arguments.values())
    places = struct.unpack(f"{len(order)}b", order)
    bound = _bound([given[place] if place >= 0 else 0 for place in places], buffers)
    sizes = (*grid, 1, 1)[:3]
    return bound and (kernel, compiled, function, sizes, threads, shared, *bound)


def _prepared_call(
    name: str, arguments: _cuda.Arguments, device: int, buffers: Sequence[Tensor | None]
) -> tuple[Any, ...] | None:
    """A call of the extension's entry point as the core takes it; None where the core cannot repeat it."""
    bound = _bound((0, device, 0, *arguments), buffers)
    return bound and (None, None, _cuda.unpacked(name), (1, 1, 1), 0, 0, *bound)


def _bound(
    arguments: Sequence[Any], buffers: Sequence[Tensor | None]
) -> tuple[bytes, list[tuple[int, int, int]]] | None:
    """Values of the arguments, 8 bytes each, and (argument, buffer, byte offset) of tensors; None if one is unknown."""
    values, addresses = b"", []
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            where = _place(value, buffers)
            if where is None:
                return None
            addresses.append((i, *where))
            value = 0
        values += (
            bytes(c_float(value)) + bytes(4)
            if isinstance(value, float)
            else struct.pack("<q", value)
        )
    return values, addresses


def _place(tensor: Tensor, buffers: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Index of the buffer that a launch's tensor lies in, and its byte offset there; None if in none or several."""
    address = tensor.data_ptr()
    for i, buffer in enumerate(buffers):
        if buffer is not None and buffer.data_ptr() == address:
            return i, 0
    storage = tensor.untyped_storage().data_ptr()
    inside = [
        (i, address - buffer.data_ptr())
        for i, buffer in enumerate(buffers)
        if buffer is not None and buffer.untyped_storage().data_ptr() == storage
    ]
    return inside[0] if len(inside) == 1 else None
