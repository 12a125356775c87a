"""Pairs of modules, as they were and swapped by ``accelerate``, with steps and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import alit_kernels as ak
from alit_kernels.accelerate import embedded, lucidrains
from alit_kernels.accelerate.families import family_of
from alit_kernels.accelerate.probe import probe_input
from alit_kernels.nn import multihead_attention

from .ops import values
from .peers import quantizers

Call = Callable[[Any, Tensor], Any]
#: (module, name) of the ops that swapped modules call.
CALLS = (
    (embedded, "vector_quantize"),
    (embedded, "nearest_codeword"),
    (lucidrains, "nearest_codeword"),
    (multihead_attention, "scaled_dot_product_attention"),
)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Context manager: a list that grows by one with each call of an op by a swapped module."""
    calls: list[int] = []
    with ExitStack() as stack:
        for module, op in CALLS:
            function = getattr(module, op)
            record = lambda *a, f=function, **k: (calls.append(1), f(*a, **k))[1]  # noqa: E731
            stack.enter_context(mock.patch.object(module, op, record))
        yield calls


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantizer as it was, a swapped copy, and an input whose nearest codes are unambiguous."""
    torch.manual_seed(0)
    theirs = quantizers()[name]
    ours = copy.deepcopy(theirs)
    report = ak.accelerate(ours, strict=True)
    assert [each.name for each in report.swapped] == [""]
    return theirs, ours, probe_input(theirs, family_of(theirs))


def leaves_of(result: Any) -> list[Any]:
    """Leaves of nested tuples, lists and dicts: tensors, numbers and None."""
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in leaves_of(part)]
    return leaves_of(tuple(result.values())) if isinstance(result, dict) else [result]


def plain(module: Any, x: Tensor) -> Any:
    return module(x)


def step(
    module: nn.Module,
    x: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    call: Call = plain,
) -> list[Any]:
    """Leaves of a call's outputs, and the gradient of its input by a weighted sum of them."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    outputs = leaves_of(call(module, leaf))
    total = sum(
        (v * values(*v.shape, seed=2).to(v.device)).sum()
        for v in outputs
        if isinstance(v, Tensor) and v.requires_grad
    )
    if isinstance(total, Tensor):
        module.zero_grad()
        total.backward()
        if optimizer is not None:
            optimizer.step()
    return [*outputs, leaf.grad]


def compare(found: list[Any], expected: list[Any], atol: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.requires_grad, a.is_contiguous()) == (b.requires_grad, b.is_contiguous())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
        else:
            assert a == b
