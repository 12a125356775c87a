"""Every op: opcheck, the profiler, results and gradients by all call paths, strides, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import alit_kernels as ak
from alit_kernels._library import Op, ops
from tests.helpers.ops import NAMES, OTHER_NAMES, PUBLIC, op_of, operator, sample, samples


def test_every_op_has_a_sample() -> None:
    assert {*map(op_of, samples())} == {name for name in ops() if not name.startswith("test_")}


@pytest.mark.parametrize("implementation", ("reference", "auto"))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, implementation: str) -> None:
    torch.library.opcheck(operator(name), (*sample(name), implementation))


@pytest.mark.parametrize("name", NAMES)
def test_shows_in_the_profiler(name: str) -> None:
    with torch.profiler.profile() as profile:
        ops()[op_of(name)](*sample(name))
    names = {event.key for event in profile.key_averages()}
    event = f"alit_kernels::{op_of(name)}"
    assert event in names and any(seen.startswith(f"{event}[") for seen in names)


@pytest.mark.parametrize("name", NAMES)
def test_a_direct_call_is_the_dispatched_one(name: str) -> None:
    """A direct call has the results, ``requires_grad`` and gradients of a call through torch's dispatcher."""
    seen, given = [], sample(name)
    for call in (ops()[op_of(name)], operator(name)):
        arguments = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in given
        ]
        dispatched = () if isinstance(call, Op) else ("auto",)
        results = call(*arguments, *dispatched)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        differentiable = [x for x in results if x.requires_grad]
        total = sum((x * x.detach().cos()).sum() for x in differentiable)
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
        flags = [(x.requires_grad, x.is_leaf, x.dtype) for x in results]
        seen.append((flags, [x.detach() for x in results], list(gradients)))
    assert seen[0][0] == seen[1][0]
    for direct, dispatched in zip(seen[0][1] + seen[0][2], seen[1][1] + seen[1][2], strict=True):
        assert (direct is None) == (dispatched is None)
        if direct is not None:
            torch.testing.assert_close(direct, dispatched, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if any(isinstance(x, Tensor) and x.requires_grad for x in sample(n))]
)  # fmt: skip
def test_functional_gradients_are_the_usual_ones(name: str) -> None:
    arguments = list(sample(name))
    places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]

    def loss(*leaves: Tensor) -> Tensor:
        for place, value in zip(places, leaves, strict=True):
            arguments[place] = value
        results = ops()[op_of(name)](*arguments)
        results = (results,) if isinstance(results, Tensor) else results
        return sum(x.float().square().sum() for x in results if x.is_floating_point())

    leaves = [arguments[place] for place in places]
    expected = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    found = torch.func.grad(loss, tuple(range(len(leaves))))(*(x.detach() for x in leaves))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_every_public_function_is_here() -> None:
    functions = {name for name in ak.__all__ if name.islower()}
    # The last function is torch's own under a dispatch mode; other tests compile it.
    others = {*OTHER_NAMES, "cumulative_offsets", "scaled_dot_product_attention"}
    assert {name for name in PUBLIC if name.islower()} == functions - others


@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_without_graph_break(name: str) -> None:
    function, inputs = PUBLIC[name]

    def run(f: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        out.sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    eager = run(function)
    torch._dynamo.reset()
    for ours, expected in zip(
        run(torch.compile(function, fullgraph=True, backend="aot_eager")), eager, strict=True
    ):
        torch.testing.assert_close(ours, expected)


def in_another_order(x: Any) -> Any:
    """Tensor of the same values with the dimensions in reverse order in memory."""
    if not isinstance(x, Tensor) or x.ndim < 2:
        return x
    dims = tuple(reversed(range(x.ndim)))
    return x.detach().permute(dims).contiguous().permute(dims)


def with_gaps(x: Any) -> Any:
    """Tensor of the same values in every other element of memory."""
    if not isinstance(x, Tensor) or x.ndim < 1:
        return x
    return x.detach().repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("implementation", ("reference", "auto"))
@pytest.mark.parametrize("layout", (in_another_order, with_gaps))
@pytest.mark.parametrize("name", NAMES)
def test_strides_are_those_that_compiled_code_expects(
    name: str, layout: Callable[[Any], Any], implementation: str
) -> None:
    arguments = tuple(map(layout, sample(name)))
    op = operator(name)
    found = op(*arguments, implementation)
    with FakeTensorMode() as mode:
        fake = (mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments)
        expected = op(*fake, implementation)
    alone = isinstance(found, Tensor)
    for a, e in zip(*((found,), (expected,)) if alone else (found, expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        where = [i for i, size in enumerate(a.shape) if size > 1 and a.numel()]
        assert [a.stride(i) for i in where] == [e.stride(i) for i in where]
