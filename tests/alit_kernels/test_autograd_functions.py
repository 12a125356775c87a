"""A plain call applies no autograd.Function with ``setup_context``: torch binds the signature in every call of one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import alit_kernels as ak
from alit import AdaptiveTokenizer
from alit_kernels.nn import (
    GELULinear,
    GroupedVQ,
    Linear,
    MultiheadAttention,
    ResidualVQ,
    SelfAttention,
    VectorQuantizer,
)
from tests.helpers.ops import LENGTHS, OFFSETS, leaf, runs

MODULES: dict[str, Callable[[], Any]] = {
    "Linear": lambda: Linear(4, 4)(leaf(3, 4)).sum(),
    "GELULinear": lambda: GELULinear(4, 4)(leaf(3, 4)).sum(),
    "SelfAttention": lambda: SelfAttention(16, 2)(leaf(2, 5, 16)).sum(),
    "SelfAttention, lengths": lambda: SelfAttention(16, 2)(leaf(3, 5, 16), lengths=LENGTHS).sum(),
    "SelfAttention, packed": lambda: SelfAttention(16, 2)(
        leaf(9, 16), offsets=OFFSETS, max_length=5
    ).sum(),
    "MultiheadAttention": lambda: MultiheadAttention(16, 2)(
        *[leaf(5, 2, 16)] * 3, need_weights=False
    )[0].sum(),
    "VectorQuantizer": lambda: VectorQuantizer(5, 4)(leaf(6, 4)).loss,
    "VectorQuantizer, moving average": lambda: (
        VectorQuantizer(5, 4, ema_decay=0.9)(leaf(6, 4)).loss
    ),
    "ResidualVQ": lambda: ResidualVQ(2, 5, 4, gradient="rotation")(leaf(6, 4)).quantized.sum(),
    "GroupedVQ": lambda: GroupedVQ(2, 5, 4)(leaf(6, 4)).loss,
}


def bound(work: Callable[[], object]) -> int:
    """Number of times torch binds the signature of an autograd.Function, as it does only with ``setup_context``."""
    count = 0

    def profile(frame: Any, event: str, _argument: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code is inspect.signature.__code__:
            count += frame.f_back.f_code.co_filename == torch.autograd.function.__file__

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", runs("cpu"))
def test_ops(name: str) -> None:
    assert not bound(runs("cpu")[name])


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    assert not bound(lambda: MODULES[name]().backward())


def test_every_module_is_there() -> None:
    """Every public module is tested, except ``UsageWindow``, which has no forward."""
    names = {name.partition(",")[0] for name in MODULES}
    assert names == set(ak.nn.__all__) - {"UsageWindow"}


@pytest.mark.parametrize("halting", ["off", "drop"])
def test_a_training_step(halting: str) -> None:
    size = {"base": "dct", "image_size": (64, 64), "iterations": 2, "halting": halting}
    model = AdaptiveTokenizer.from_size("nano", **size).train()

    def step() -> None:
        *_, last = model.rollout(torch.rand(2, 3, 64, 64))
        assert last.prediction is not None
        last.prediction.code_BNC.sum().backward()

    assert not bound(step)


def test_under_a_transform_it_is_needed() -> None:
    def total(x: Tensor) -> Tensor:
        return ak.unpack(x, OFFSETS, max_length=6).sum()

    assert bound(lambda: torch.func.grad(total)(torch.ones(9, 4)))
