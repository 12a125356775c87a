"""Calls with a known signature: checks that are skipped, and checks that must not be."""

from __future__ import annotations

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from alit_kernels import _calls, attention, varlen_attention
from alit_kernels._calls import Public
from alit_kernels._core import sees_tensors
from alit_kernels._library import Op
from alit_kernels.attention import op

pytestmark = pytest.mark.skipif(not sees_tensors(), reason="needs the core and torch 2.10 or later")
OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


def leaves(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def test_a_known_call_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known call is neither checked nor dispatched to an implementation again, with gradients and without."""
    q, k, v = leaves(2, 7, 1, 4)
    expected = attention(q, k, v)
    gradients = torch.autograd.grad(expected.sum(), (q, k, v))

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(op, "check_tensor", asked)
    monkeypatch.setattr(Op, "choose", asked)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), expected)
    found = attention(q, k, v)
    for one, other in zip(torch.autograd.grad(found.sum(), (q, k, v)), gradients, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(AssertionError, match="asked again"):
        attention(q[:1], k[:1], v[:1])


def test_values_are_checked_all_the_same() -> None:
    rows = leaves(5, 1, 4)
    for _ in range(2):
        varlen_attention(*rows, OFFSETS, max_length=3)
        with pytest.raises(ValueError, match="offsets: "):
            varlen_attention(*rows, OFFSETS.flip(0), max_length=3)


def test_what_a_known_call_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves(2, 5, 1, 4)
    for _ in range(2):
        assert attention(q, k, v).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(q, k, v).dtype == torch.bfloat16
        halves = [x.half() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.float16):
            assert attention(*halves).dtype == torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(*halves).dtype == torch.bfloat16
        assert isinstance(attention(q, k, v, return_lse=True), tuple)
        monkeypatch.setenv(_calls.ENVIRONMENT_VARIABLE, "nonsense")
        with pytest.raises(ValueError, match="implementation='nonsense'"):
            attention(q, k, v)
        assert attention(q, k, v, implementation="reference").shape == q.shape
        monkeypatch.delenv(_calls.ENVIRONMENT_VARIABLE)


def test_the_environment_chooses_for_known_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    op = Op(
        "test_chosen(Tensor x) -> Tensor",
        reference=lambda x: ran.append("reference") or x * 2,
        fake=torch.empty_like,
        others={"torch": lambda x: ran.append("torch") or x * 2},
    )
    known, x = Public(op), torch.ones(2)

    def call(implementation: str = "auto") -> None:
        if known.call(x, implementation) is None:
            known.first((x, implementation), (x,))

    for _ in range(2):
        call()
        monkeypatch.setenv(_calls.ENVIRONMENT_VARIABLE, "reference")
        call()
        call("reference")
        monkeypatch.delenv(_calls.ENVIRONMENT_VARIABLE)
    assert ran == ["torch", "reference", "reference"] * 2
    assert len(known.call) == 2, "asked for in the call or by the environment is one"


def test_one_tensor_in_two_places() -> None:
    """Gradients go to the right argument if one tensor's memory is passed in several places."""
    x = torch.randn(1, 6, 1, 4)
    attention(x, x, x)
    for place in range(3):
        q, k, v = arguments = [x.clone() for _ in range(3)]
        arguments[place].requires_grad_()
        (expected,) = torch.autograd.grad(attention(q, k, v).square().sum(), arguments[place])
        shared = [x.detach() for _ in range(3)]
        shared[place].requires_grad_()
        (found,) = torch.autograd.grad(attention(*shared).square().sum(), shared[place])
        assert torch.equal(found, expected)


def test_other_tensors_than_the_functions_are_not_remembered() -> None:
    op = Op(
        "test_others(Tensor x, Tensor y) -> Tensor",
        reference=lambda x, y: x - y,
        fake=lambda x, y: torch.empty_like(x),
    )
    known, (x, y, _) = Public(op), leaves(3)
    known.first((x, y, "auto"), (y, x))
    known.first((x, y, "auto"), (x.clone(), y))
    known.first((x, "auto"), (x, y))
    assert not len(known.call) and known.call(x, y, "auto") is None
    known.first((x, y, "auto"), (x, y))
    assert len(known.call) == 1 and torch.equal(known.call(y, x, "auto"), y - x)


def test_results_are_finished_and_gradients_stop_where_there_are_none() -> None:
    op = Op(
        "test_finished(Tensor x, int n) -> Tensor",
        reference=lambda x, n: x * n,
        fake=lambda x, n: x,
    )
    known, (x, *_) = Public(op, differentiable=False), leaves(3)
    first = known.first((x, 2, "auto"), (x, 2), lambda y: (y, "finished"))
    found = known.call(x, 2, "auto")
    for result, word in (first, found):
        assert torch.equal(result, 2 * x) and not result.requires_grad and word == "finished"
    assert known.call(x, 3, "auto") is None


def test_a_known_call_keeps_no_tensor() -> None:
    q, k, v = leaves(1, 3, 1, 4)
    attention(q, k, v)
    seen = ref(q)
    del q, k, v
    assert seen() is None


@pytest.mark.parametrize(("name", "launches"), (("planned", True), ("unplanned", False)))
def test_what_a_plan_has_computed_is_differentiated(name: str, launches: bool) -> None:
    """Results of a plan, or of the implementation if the plan cannot launch, are differentiated."""
    planned = Op(
        f"test_{name}(Tensor x) -> Tensor",
        reference=lambda x: 2 * x,
        fake=torch.empty_like,
    )
    planned.register_autograd(
        lambda ctx, grad: (grad * ctx.saved_tensors[0],),
        lambda ctx, inputs, output: ctx.save_for_backward(output),
    )
    x = torch.ones(3, requires_grad=True)
    for factor in (2.0, 7.0 if launches else 2.0):
        y = planned(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (y == factor).all() and (grad == factor).all()
        key, known = planned.calls.key(x, "auto"), planned.known(x, "auto")
        plan = (lambda x: 7 * x.detach()) if launches else (lambda x: None)
        planned.calls.add(key, plan, known, (x, "auto"), None)
