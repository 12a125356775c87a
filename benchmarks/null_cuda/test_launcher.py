"""The launcher's launches equal Triton's byte for byte: arguments, devices, streams, threads, hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from alit_kernels import _launcher, _triton, attention

from .launches import Launch, assert_as_triton, in_a_child, launcher, recorded, resident

BYTES = torch.empty(4096, dtype=torch.uint8, device="cuda")
FLOATS = BYTES.view(torch.float32)
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit
def any_kernel(p_x, a, b, SIZE: tl.constexpr, KIND: tl.constexpr):
    if a is not None:
        tl.store(p_x, a)
    if b is not None:
        tl.store(p_x + SIZE, b)


@triton.jit(do_not_specialize=["a"], do_not_specialize_on_alignment=["b"])
def unspecialized_kernel(p_x, a, b, SIZE: tl.constexpr, KIND: tl.constexpr):
    tl.store(p_x, a)
    tl.store(p_x + SIZE, b)


def arguments(**changed: Any) -> dict[str, Any]:
    return {"p_x": FLOATS, "a": 3, "b": 2.5, "SIZE": 8, "KIND": "one", **OPTIONS, **changed}


KERNELS = pytest.mark.parametrize("kernel", [any_kernel, unspecialized_kernel])


@KERNELS
@pytest.mark.parametrize("offset", range(17))
def test_alignments(kernel: Any, offset: int) -> None:
    assert BYTES.data_ptr() % 16 == 0
    assert_as_triton(kernel, (3,), **arguments(p_x=BYTES[offset:]))
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool):
        if offset % dtype.itemsize == 0:
            moved = BYTES[offset : offset + 1024].view(dtype)
            assert_as_triton(kernel, (3, 2), **arguments(p_x=moved))
            assert_as_triton(kernel, (1,), **arguments(p_x=torch.nn.Parameter(moved, False)))


INTEGERS = (0, 1, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32)


@KERNELS
@pytest.mark.parametrize("number", [*INTEGERS, 2**63 - 1, 2**63 - 16, -(2**63)])
def test_integers(kernel: Any, number: int) -> None:
    assert_as_triton(kernel, (2, 3, 4), **arguments(a=number, b=number))
    assert_as_triton(kernel, (2, 3, 4), **arguments(b=number))


@KERNELS
def test_what_triton_alone_launches(kernel: Any) -> None:
    """Unsigned 64-bit integers and booleans are left to Triton."""
    for value in (2**63, 2**64 - 1, True, False):
        assert_as_triton(kernel, (1,), remembered=False, **arguments(b=value))


@KERNELS
@pytest.mark.parametrize(
    "number", [0.0, -0.0, 1.0, 16.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e300]
)
def test_floats(kernel: Any, number: float) -> None:
    assert_as_triton(kernel, (1,), **arguments(a=number, b=number))


def test_none() -> None:
    for changed in ({"a": None}, {"b": None}, {"a": None, "b": None}):
        assert_as_triton(any_kernel, (1,), **arguments(**changed))


def test_an_argument_changes_its_kind() -> None:
    """Values of different types under the same name, in order and in reverse order, launch as by Triton."""
    values = (1, 1.0, None, 16, 2**40, 7)
    for value in values + values[::-1]:
        assert_as_triton(any_kernel, (1,), **arguments(a=value, b=value))
        for tensor in (FLOATS, BYTES, BYTES[1:], FLOATS[:2]):
            assert_as_triton(any_kernel, (1,), **arguments(p_x=tensor, a=value))


@KERNELS
def test_constants_and_options(kernel: Any) -> None:
    for size in (0, 1, 8, -8, 2**40):
        assert_as_triton(kernel, (1,), **arguments(SIZE=size))
    for kind in (
        1,
        1.0,
        True,
        False,
        None,
        0.0,
        -0.0,
        float("nan"),
        "1",
        "two",
        "",
        "x" * 24,
        "äöü",
    ):
        assert_as_triton(kernel, (1,), **arguments(KIND=kind))
    for kind in (tl.float32, "x" * 25):
        assert_as_triton(kernel, (1,), remembered=False, **arguments(KIND=kind))
    for option in ({"num_warps": 1}, {"num_warps": 8}, {"num_stages": 1}):
        assert_as_triton(kernel, (1,), **arguments(**option))
    assert_as_triton(kernel, (1,), **arguments(enable_fp_fusion=False))


def test_grids() -> None:
    for grid in ((1,), (7, 1), (2**31 - 1, 1, 1), (3, 4, 65535)):
        assert_as_triton(any_kernel, grid, **arguments())
    assert not recorded(lambda: _triton.launch(any_kernel, (3, 0), **arguments()))


def test_two_devices() -> None:
    other = torch.empty(64, device="cuda:1")
    assert_as_triton(any_kernel, (1,), **arguments())
    here = recorded(lambda: _triton.launch(any_kernel, (1,), **arguments()))
    with torch.cuda.device(1):
        assert_as_triton(any_kernel, (1,), **arguments(p_x=other))
        there = recorded(lambda: any_kernel[(1,)](**arguments(p_x=other)))
    assert there[0].function != here[0].function
    for device in (0, 1):  # the tensors', whichever is the current one
        with torch.cuda.device(device):
            for tensor, expected in ((FLOATS, here), (other, there)):
                launch = arguments(p_x=tensor)
                assert recorded(lambda: _triton.launch(any_kernel, (1,), **launch)) == expected  # noqa: B023


def test_another_stream() -> None:
    stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
    for current in (default, stream, default):
        with torch.cuda.stream(current):
            assert_as_triton(any_kernel, (1,), **arguments())
            (launch,) = recorded(lambda: _triton.launch(any_kernel, (1,), **arguments()))
        assert launch.stream == current.cuda_stream
    assert stream.cuda_stream != default.cuda_stream


def test_within_a_capture() -> None:
    assert_as_triton(any_kernel, (1,), **arguments())
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        found = recorded(lambda: _triton.launch(any_kernel, (5,), **arguments()))
    assert [x.stream for x in found] == [stream.cuda_stream]
    with torch.cuda.stream(stream):
        assert found == recorded(lambda: any_kernel[(5,)](**arguments()))


@pytest.fixture
def hooks() -> Iterator[tuple[list[str], Callable[..., None]]]:
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    yield seen, hook
    for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        if hook in chain.calls:
            chain.remove(hook)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_launches(name: str, hooks: tuple[list[str], Callable[..., None]]) -> None:
    (seen, hook), chain = hooks, getattr(triton.knobs.runtime, name)
    assert_as_triton(any_kernel, (1,), **arguments())
    chain.add(hook)
    _triton.launch(any_kernel, (1,), **arguments())
    assert seen == ["any_kernel"]
    chain.remove(hook)
    _triton.launch(any_kernel, (1,), **arguments())
    assert seen == ["any_kernel"]


def test_hooks_of_a_kernel_see_launches() -> None:
    seen: list[int] = []
    assert_as_triton(any_kernel, (1,), **arguments())
    any_kernel.add_pre_run_hook(lambda *_, **given: seen.append(given["a"]))
    _triton.launch(any_kernel, (1,), **arguments(a=7))
    any_kernel.pre_run_hooks.clear()
    assert seen == [7]


@triton.jit
def changing_kernel(p_x, n):
    tl.store(p_x, n)


def test_a_kernel_is_compiled_again() -> None:
    launch = {"p_x": FLOATS, "n": 3, **OPTIONS}
    assert_as_triton(changing_kernel, (1,), **launch)
    (before,) = recorded(lambda: _triton.launch(changing_kernel, (1,), **launch))
    changing_kernel._unsafe_update_src(changing_kernel.src.replace("p_x, n)\n", "p_x, n + 1)\n"))
    changing_kernel.device_caches.clear()
    (after,) = recorded(lambda: _triton.launch(changing_kernel, (1,), **launch))
    assert after.function != before.function
    assert [after] == recorded(lambda: changing_kernel[(1,)](**launch))
    assert_as_triton(changing_kernel, (1,), **launch)


def test_threads() -> None:
    """Eight threads launch at once, with one signature and with many, each with its own numbers."""
    wrong: list[tuple[list[Launch], int]] = []
    assert_as_triton(any_kernel, (1,), **arguments())
    (pattern,) = recorded(lambda: any_kernel[(1,)](**arguments()))
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for i in range(300):
            number = 1000 * thread + 2 * i + 3
            options = arguments(a=number, b=number, SIZE=8 + i % (thread + 1))
            found = recorded(lambda: _triton.launch(any_kernel, (number,), **options))  # noqa: B023
            right = len(found) == 1 and found[0].grid == (number, 1, 1)
            if not right or found[0].parameters[:3] != (pattern.parameters[0], number, number):
                wrong.append((found, number))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong, wrong[0]


def test_a_forked_process_is_told() -> None:
    """A launch in a forked process raises torch's error about CUDA in forked processes, as with Triton."""
    assert_as_triton(any_kernel, (1,), **arguments())
    assert "forked" in in_a_child(lambda: _triton.launch(any_kernel, (1,), **arguments()))
    assert_as_triton(any_kernel, (1,), **arguments())


def test_memory_is_bounded() -> None:
    """Memory stays bounded with 100,000 signatures of one kernel and with more kernels than the cache holds."""
    compiled = any_kernel[(1,)](**arguments())
    launch = _launcher.launcher(lambda kernel, grid, **_: compiled)

    def launched(numbers: range) -> int:
        for i in numbers:
            launch(any_kernel, (1,), **arguments(SIZE=i))
            launch(any_kernel, (1,), **arguments(KIND=f"{i:08}"))
        return resident()

    before = launched(range(10_000))
    after = launched(range(10_000, 50_000))
    assert after - before < 1 << 20, f"{after - before} bytes more"
    for _ in range(1000):
        launch(triton.jit(any_kernel.fn), (1,), **arguments())
    assert launch.counts()[2] <= 600
    hits = launch.counts()[0]
    for _ in range(2):
        launch(any_kernel, (1,), **arguments())
    assert launch.counts()[0] == hits + 1


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, all launches go through Triton, in every call of an op."""
    x, expected = torch.empty(2, 40, 2, 64, device="cuda"), launcher()
    monkeypatch.setenv(_launcher.ENVIRONMENT_VARIABLE, "0")
    _launcher.enabled.cache_clear()
    _triton._launcher.cache_clear()
    try:
        hits = expected.counts()[0]
        launches = [recorded(lambda: attention(x, x, x)) for _ in range(3)]
        assert _triton._launcher() is _triton.through_triton
    finally:
        monkeypatch.undo()
        _launcher.enabled.cache_clear()
        _triton._launcher.cache_clear()
    assert [len(each) for each in launches] == [1, 1, 1]
    assert expected.counts()[0] == hits
    assert launcher() is not _triton.through_triton
