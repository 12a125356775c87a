"""Every kernel is launched as by Triton; a plan repeats the launches that an op makes without one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import alit_kernels as ak
from alit_kernels import _triton, aot
from alit_kernels._library import Op, ops
from tests.helpers.ops import runs

from .cases import CODES, Case, cases, empty
from .launches import Launch, Seen, assert_as_triton, in_a_child, on_this_thread, recorded, resident

Work = Callable[[], Any]


def work_of(case: Case) -> Work:
    leaf = case.leaf().requires_grad_(case.learns)

    def work() -> Any:
        result = case.ours(leaf)
        if not case.learns:
            return result
        return result, torch.autograd.grad(result, leaf, torch.ones_like(result))

    return work


def works() -> dict[str, Work]:
    z, codes = empty(512, 64), empty(CODES, 64)
    rows, mask = empty(512, 64).requires_grad_(), torch.ones(512, dtype=torch.bool, device="cuda")
    return {
        **{case.name: work_of(case) for case in cases()},
        **{f"{name}, as the tests have it": work for name, work in runs("cuda").items()},
        "vector_quantize, mask": lambda: torch.autograd.grad(
            ak.vector_quantize(rows, codes, mask=mask).loss, rows
        ),
        "nearest_codeword, products": lambda: ak.nearest_codeword(z, codes, precision="bf16"),
    }


WORKS = works()
#: Modules whose calls do more than a plan can repeat.
UNPLANNED = ("nn.VectorQuantizer", "nn.SelfAttention, lengths")
#: Under a dispatch mode, calls of these are torch's own.
TORCHS = ("nn.MultiheadAttention", "scaled_dot_product_attention")


def test_every_kernel_is_launched_as_by_triton() -> None:
    seen = set()

    def compared(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        assert_as_triton(kernel, grid, **arguments)
        seen.add(f"{kernel.__module__}.{kernel.__name__}")

    with on_this_thread(), Seen(), _triton.recorded(compared):
        for work in WORKS.values():
            work()
    assert seen == {kernel for package in aot.packages() for kernel in aot.uncovered(package, [])}


def test_every_op_and_module_is_a_case() -> None:
    with on_this_thread(), Seen() as seen:
        for case in cases():
            work_of(case)()
    assert seen.ops == set(ops())
    names = " ".join(case.name for case in cases())
    assert all(f"nn.{name}" in names for name in ak.nn.__all__)


def called(function: Callable[..., Any], work: Work) -> int:
    """Number of calls of a Python function in ``work``."""
    calls = 0

    def profile(frame: Any, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code is function.__code__

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def assert_same(found: list[Launch], expected: list[Launch]) -> None:
    """Check that the launches are equal, up to a one-to-one mapping of addresses within each launch."""
    here, there = ([x._replace(parameters=()) for x in launches] for launches in (found, expected))
    assert here == there
    for one, other in zip(found, expected, strict=True):
        pairs = set(zip(one.parameters, other.parameters, strict=True))
        moved = [(x, y) for x, y in pairs if x != y]
        for x, y in moved:
            assert min(x, y) > 1 << 40 and x % 512 == y % 512, "no addresses"
        assert len({x for x, _ in moved}) == len({y for _, y in moved}) == len(moved)


def assert_planned(work: Work, planned: bool = True) -> None:
    """Check that the third call of ``work`` launches the same as one without plans; ``planned``: by plans only."""
    with on_this_thread():
        work()
        work()
        found = recorded(work)
        with Seen():
            expected = recorded(work)
        assert expected, "nothing was launched"
        assert_same(found, expected)
        if planned:
            assert not called(_triton.launch, work), "a kernel was launched without a plan"


@pytest.mark.parametrize("name", [name for name in WORKS if not name.startswith(TORCHS)])
def test_a_plan_repeats_the_launches(name: str) -> None:
    assert_planned(WORKS[name], planned=not name.startswith(UNPLANNED))


def of_one_buffer(*shape: int) -> list[Tensor]:
    return list(empty(3, *shape).unbind())


def apart(tensors: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors
    ]


def interleaved(*shape: int) -> list[Tensor]:
    return list(empty(*shape[:-2], 3, *shape[-2:]).unbind(-3))


def moved(*shape: int, by: int) -> list[Tensor]:
    size = torch.Size(shape).numel()
    return [empty(size + by)[by:].view(shape) for _ in range(3)]


SHAPE = (3, 70, 2, 64)


@triton.jit
def copy_kernel(p_from, p_to):
    tl.store(p_to, tl.load(p_from))


def test_a_plan_takes_parts_of_tensors() -> None:
    def launches(x: Tensor) -> Tensor:
        made = x.new_empty(x.shape)
        _triton.launch(copy_kernel, (2,), p_from=x[4:], p_to=made[32:])
        _triton.launch(copy_kernel, (1,), p_from=made[1:], p_to=made.view(8, -1)[3])
        return made

    functions = {"reference": torch.clone, "fake": torch.empty_like}
    op = Op("test_parts(Tensor x) -> Tensor", **functions, others={"triton": launches})
    x, y = empty(64), empty(64)
    assert_planned(lambda: op(x))
    made = []
    one, other = recorded(lambda: made.append(op(y)))
    to = made[0].data_ptr()
    assert one.parameters[:2] == (y.data_ptr() + 8, to + 64)
    assert other.parameters[:2] == (to + 2, to + 48)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_plan_takes_tensors_as_they_lie(needs_gradient: bool) -> None:
    """Plans work for tensors in one buffer, apart, passed twice, or moved in memory, in order and in reverse order."""
    x, one_buffer, mixed = empty(*SHAPE), of_one_buffer(*SHAPE), interleaved(*SHAPE)
    kinds = [
        *([x] * 3, apart([x] * 3), [x, x, empty(*SHAPE)], [x, empty(*SHAPE), x]),
        *(
            one_buffer,
            apart(one_buffer),
            mixed,
            apart(mixed),
            moved(*SHAPE, by=4),
            moved(*SHAPE, by=8),
        ),
        [x.transpose(1, 2).contiguous().transpose(1, 2)] * 3,
        [x[:, ::2].contiguous(), x, x],
    ]
    copied = [x[:1].expand(SHAPE), x, x]

    def work(kind: list[Tensor]) -> Any:
        leaf = kind[0].detach().requires_grad_(needs_gradient)
        out = ak.attention(leaf, *kind[1:])
        return torch.autograd.grad(out, leaf, torch.ones_like(out)) if needs_gradient else out

    with on_this_thread():
        for _ in range(2):
            for kind in [*kinds, copied, *kinds[::-1]]:
                assert_planned(lambda: work(kind), planned=kind is not copied)  # noqa: B023


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 0.1, 1e38, 1e300, -3.0])
def test_a_plan_keeps_numbers(scale: float) -> None:
    x = empty(*SHAPE)
    # If the scale is not positive its sign is applied to a copy of the queries.
    assert_planned(lambda: ak.attention(x, x, x, scale=scale), planned=scale > 0)


def test_a_plan_goes_to_the_current_stream() -> None:
    x = empty(*SHAPE)
    work = lambda: ak.attention(x, x, x)  # noqa: E731
    assert_planned(work)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert_planned(work)
        assert {launch.stream for launch in recorded(work)} == {stream.cuda_stream}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        assert {launch.stream for launch in recorded(work)} == {stream.cuda_stream}
        assert not called(_triton.launch, work)


def test_a_plan_is_of_one_device() -> None:
    here = empty(*SHAPE)
    there = here.to("cuda:1")
    for x in (here, there, here):
        with torch.cuda.device(x.device):
            assert_planned(lambda: ak.attention(x, x, x))  # noqa: B023
    with torch.cuda.device(1):  # not the tensors'
        assert_planned(lambda: ak.attention(here, here, here), planned=False)
        assert ak.attention(here, here, here).device == here.device
    one, other = (recorded(lambda: ak.attention(x, x, x))[0].function for x in (here, there))  # noqa: B023
    assert one != other


def test_hooks_see_the_launches_of_a_plan() -> None:
    x, seen = empty(*SHAPE), []
    work = lambda: ak.attention(x, x, x)  # noqa: E731
    assert_planned(work)
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        work()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["forward_kernel"]
    work()
    assert seen == ["forward_kernel"]


def test_threads() -> None:
    """Threads call an op at once, with inputs of their own or shared, some signatures being learnt meanwhile."""
    inputs = [empty(1 + i % 4, 70 + i // 4, 2, 64) for i in range(8)]
    wrong: list[object] = []

    def work(x: Tensor) -> None:
        found = [recorded(lambda: ak.attention(x, x, x)) for _ in range(100)]
        addresses = {x.data_ptr() in launch.parameters for (launch,) in found}
        grids = {launch.grid for (launch,) in found}
        if addresses != {True} or len(grids) != 1:
            wrong.append(found)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs * 2]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    for x in inputs:
        assert_planned(lambda: ak.attention(x, x, x))  # noqa: B023


def test_a_forked_process_is_told() -> None:
    x = empty(*SHAPE)
    assert_planned(lambda: ak.attention(x, x, x))
    assert "forked" in in_a_child(lambda: ak.attention(x, x, x))


def test_memory_is_bounded() -> None:
    """Memory stays bounded with more signatures than an op remembers."""
    x = empty(*SHAPE)

    def called_with(scales: range) -> int:
        for i in scales:
            ak.attention(x, x, x, scale=1.0 + i)
        return resident()

    before = called_with(range(2000))
    assert called_with(range(2000, 5000)) - before < 2 << 20
