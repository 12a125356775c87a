"""Record kernel launches as the driver receives them, and compare ours with Triton's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import driver

SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}
#: Function -> bytes of each parameter of its machine code.
_sizes: dict[int, list[int]] = {}


class Launch(NamedTuple):
    """One launch as the driver receives it; parameters, of Triton's kernels only, as integers of their own width."""

    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    parameters: tuple[int, ...]


def parameter_bytes(ptx: str) -> list[int]:
    entry = ptx[ptx.index(".entry") :]
    lines = [x for x in entry[: entry.index(")")].splitlines() if ".param" in x]
    return [SIZES[line.split(".param", 1)[1].split()[0].lstrip(".usbf")] for line in lines]


def watch() -> None:
    """Patch Triton to note the parameter sizes of every kernel that it loads, for :func:`recorded`."""
    from triton.compiler import CompiledKernel

    load = CompiledKernel._init_handles

    def loaded(kernel: Any) -> None:
        load(kernel)
        if kernel.function not in _sizes:
            sizes = parameter_bytes(kernel.asm["ptx"])
            driver.library().null_cuda_parameters(kernel.function, len(sizes))
            _sizes[kernel.function] = sizes

    CompiledKernel._init_handles = loaded


def recorded(work: Callable[[], object]) -> list[Launch]:
    """Kernel launches that this thread makes in ``work``, in order."""
    library = driver.library()
    library.null_cuda_record(1)
    try:
        work()
    finally:
        library.null_cuda_record(0)
    return [_launch(library.null_cuda_launch(i)) for i in range(library.null_cuda_recorded())]


def _launch(words: Any) -> Launch:
    function, *grid, threads, shared, stream, count = words[:8]
    sizes = _sizes.get(function, [])
    assert count == len(sizes)
    parameters = (
        x & ((1 << 8 * size) - 1) for x, size in zip(words[8 : 8 + count], sizes, strict=True)
    )
    return Launch(function, tuple(grid), threads, shared, stream, tuple(parameters))


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_a_child(work: Callable[[], object]) -> str:
    """Message of the RuntimeError that ``work`` raises in a forked process; "" if it raises none."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as told:
        text = told.read().decode()
    os.waitpid(child, 0)
    return text


def launcher() -> Any:
    from alit_kernels import _triton

    found = _triton._launcher()
    assert found is not _triton.through_triton, "the launcher is not in use"
    return found


def assert_as_triton(
    kernel: Any, grid: tuple[int, ...], remembered: bool = True, **arguments: Any
) -> None:
    """Check that the launcher launches as Triton does, both in the first call and in a repeated one.

    ``remembered``: whether the repeated call must hit the launcher's cache.
    """
    launch = launcher()
    expected = recorded(lambda: kernel[grid](**arguments))
    learnt = recorded(lambda: launch(kernel, grid, **arguments))
    hits = launch.counts()[0]
    known = recorded(lambda: launch(kernel, grid, **arguments))
    assert (launch.counts()[0] > hits) == remembered, f"{kernel.__name__}: remembered or not"
    assert learnt == expected, f"{kernel.__name__}: {learnt}, by Triton {expected}"
    assert known == expected, f"{kernel.__name__}: {known}, by Triton {expected}"


class Seen(TorchDispatchMode):
    """Dispatch mode that keeps calls from being replaced by plans; ``ops``: names of our ops called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "alit_kernels":
            self.ops.add(function._opname)
        return function(*args, **(kwargs or {}))


def on_this_thread() -> torch.autograd.graph.set_multithreading_enabled:
    """Context manager: run backwards on this thread, so that their launches are recorded too."""
    return torch.autograd.set_multithreading_enabled(False)
