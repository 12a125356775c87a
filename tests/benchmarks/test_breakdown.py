"""The stopwatch within a training step changes no result, and its parts add up."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from benchmarks.peers.baseline import Step
from benchmarks.suites.breakdown import PARTS, Stopwatch, breakdown
from benchmarks.suites.test_stage1_step import Case, agree, contender


def step(name: str) -> Step:
    return contender(name, *Case("tiny", 2).prepared(quick=True))


@pytest.mark.parametrize(
    ("name", "together"), [("ours", False), ("ours", True), ("eager baseline", None)]
)
def test_parts_add_up(name: str, together: bool | None) -> None:
    own = step(name)
    own.together = together
    before = own()
    start = time.perf_counter()
    parts, result = breakdown(own)
    elapsed = time.perf_counter() - start
    assert set(parts) == set(PARTS) and all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) <= elapsed
    assert not own.model.decoder._forward_hooks and not own.model.decoder._backward_hooks
    assert "optimize" not in vars(own) and "encode" not in vars(own.model.base_tokenizer)
    for after in (result, own()):
        assert all(map(torch.equal, before, after)), "weights or modules changed"


def test_both_steps_agree() -> None:
    found = step("ours")()
    for name in ("eager baseline", "eager baseline, fused attention"):
        agree(found, step(name)())


@pytest.mark.parametrize("half", (False, True))
def test_wrong_steps_do_not_agree(half: bool) -> None:
    """Steps do not agree with other images, a wrong term, a missing gradient, or gradients slightly too large."""
    own = step("ours")
    right = own()
    agree(own(), right, half)
    here = right.gradients > 1e-5 * right.gradients.max()
    gradients = [right.gradients.index_fill(0, i, 0) for i in here.nonzero()]
    terms = [right.terms * (1 - 0.1 * (torch.arange(3) == term)) for term in range(3)]
    assert len(gradients) > 50
    wrong = [right._replace(gradients=x) for x in (*gradients, 1.03 * right.gradients)]
    wrong += [right._replace(terms=x) for x in terms]
    if not half:
        own.images = 1 - own.images
        wrong.append(own())
    for found in wrong:
        with pytest.raises(AssertionError):
            agree(found, right, half)


@pytest.mark.skipif(torch.cuda.is_available(), reason="moments are events on a GPU")
def test_time_goes_to_the_innermost() -> None:
    watch = Stopwatch()
    watch.events = [(0.0, "decoder", True), (1.0, "attention", True), (3.0, "attention", False)]
    watch.events += [(3.5, "decoder", False), (9.0, "base", True), (9.25, "base", False)]
    assert watch.seconds() == {"decoder": 1.5, "attention": 2.0, "base": 0.25}
    watch.events = [(0.0, "decoder", True), (1.0, "attention", False)]
    with pytest.raises(RuntimeError, match="attention ends"):
        watch.seconds()
