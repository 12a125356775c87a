"""What an implementation does on the host for one signature of its arguments, done once.

Checks, the choice of tiles, strides, the grid: all follow from shapes, types and numbers. An implementation that only
allocates, takes views and launches Triton kernels is watched once, and from then on its allocations and launches are
repeated with the addresses of other tensors: one call of the core (``csrc/launcher/plan.cpp``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _launcher, _triton
from ._core import extension
from ._dispatch import LOOKS

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


def new_table(most: int) -> Any:
    """An op's plans by signature: ``csrc/launcher/plans.cpp``."""
    return extension().Plans(looks=LOOKS, grad_mode=torch.is_grad_enabled, most=most)


class _Watch(TorchDispatchMode):
    """Allocations, and whether there is anything but these and views."""

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
    """The function's result, and a plan of it; None where it does more than a plan can.

    Args:
        values: the function's arguments.
        tensors: the tensors among them, in the order in which the plan will be given others.
    """
    launches: list[tuple[Any, ...]] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append(
            (kernel, grid, arguments, _triton.through_triton(kernel, grid, **arguments))
        )

    watch = _Watch()
    with _triton.recorded(record), watch:
        result = function(*values)
    return result, None if watch.other else _plan(tensors, watch.allocated, launches, result)


def _plan(
    tensors: Sequence[Tensor | None],
    allocated: list[Tensor],
    launches: list[tuple[Any, ...]],
    result: Any,
) -> Any:
    results = [result] if isinstance(result, Tensor) else list(result)
    places = {id(tensor): len(tensors) + i for i, tensor in enumerate(allocated)}
    first = tensors[0]
    contiguous = all(tensor.is_contiguous() for tensor in allocated)
    if first is None or not contiguous or not all(id(tensor) in places for tensor in results):
        return None
    buffers = [*tensors, *allocated]
    prepared = []
    for kernel, grid, arguments, compiled in launches:
        entry = _prepared(kernel, grid, arguments, compiled, buffers)
        if entry is None:
            return None
        prepared.append(entry)
    from triton import knobs

    where = tuple(places[id(tensor)] - len(tensors) for tensor in results)
    return extension().Plan(
        launches=prepared,
        device=first.device.index,
        runtime=knobs.runtime,
        allocations=[(t.shape, None if t.dtype == first.dtype else t.dtype) for t in allocated],
        results=where[0] if isinstance(result, Tensor) else where,
    )


def _prepared(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    compiled: Any,
    buffers: Sequence[Tensor | None],
) -> tuple[Any, ...] | None:
    """A launch as the core takes it."""
    names = tuple(arguments)
    found = None if compiled is None else _launcher.plan(kernel, compiled, names)
    if found is None:
        return None
    function, threads, shared, order = found
    given, values, addresses = list(arguments.values()), b"", []
    for parameter, place in enumerate(struct.unpack(f"{len(order)}b", order)):
        value = given[place] if place >= 0 else 0
        if isinstance(value, Tensor):
            where = _place(value, buffers)
            if where is None:
                return None
            addresses.append((parameter, *where))
            value = 0
        values += (
            bytes(c_float(value)) + bytes(4)
            if isinstance(value, float)
            else struct.pack("<q", value)
        )
    sizes = (*grid, 1, 1)[:3]
    return kernel, compiled, function, sizes, threads, shared, values, addresses


def _place(tensor: Tensor, buffers: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Which buffer a launch's tensor lies in, and how many bytes from its first element; None where several may be."""
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
