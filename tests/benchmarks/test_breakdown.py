"""The stopwatch within a training step: it changes nothing, and its parts add up."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from benchmarks.suites.breakdown import PARTS, Stopwatch, breakdown
from benchmarks.suites.models import model, pictures
from benchmarks.suites.test_stage1_step import agree, contender


@pytest.mark.parametrize(
    ("name", "together"), [("ours", False), ("ours", True), ("eager baseline", None)]
)
def test_parts_add_up(name: str, together: bool | None) -> None:
    ours = model(quick=True).train()
    ours.base_tokenizer.requires_grad_(False)
    step = contender(name, ours, pictures(ours, 2))
    step.together = together
    forward = step.model.decoder.forward
    before = step()
    start = time.perf_counter()
    parts, result = breakdown(step)
    elapsed = time.perf_counter() - start
    assert set(parts) == set(PARTS) and all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) <= elapsed
    assert step.model.decoder.forward == forward
    for after in (result, step()):
        assert all(map(torch.equal, before, after)), "weights or modules changed"


def test_both_steps_agree() -> None:
    ours = model(quick=True).train()
    ours.base_tokenizer.requires_grad_(False)
    images = pictures(ours, 2)
    ours_found, *others = (
        contender(name, ours, images)()
        for name in ("ours", "eager baseline", "eager baseline, fused attention")
    )
    for other in others:
        agree(ours_found, other)


@pytest.mark.parametrize("half", (False, True))
def test_wrong_steps_do_not_agree(half: bool) -> None:
    """Other pictures, a wrong term, a parameter whose gradient is left out, all gradients a little too large."""
    ours = model(quick=True).train()
    ours.base_tokenizer.requires_grad_(False)
    step = contender("ours", ours, pictures(ours, 2))
    right = step()
    agree(step(), right, half)
    wrong = []
    for where in range(len(right.gradients)):
        if right.gradients[where] > 1e-5 * right.gradients.max():
            wrong.append(right._replace(gradients=right.gradients.clone()))
            wrong[-1].gradients[where] = 0
    assert len(wrong) > 50
    for term in range(3):
        wrong.append(right._replace(terms=right.terms.clone()))
        wrong[-1].terms[:, term] *= 0.9
    wrong.append(right._replace(gradients=1.03 * right.gradients))
    if not half:
        step.images = 1 - step.images
        wrong.append(step())
    for found in wrong:
        with pytest.raises(AssertionError):
            agree(found, right, half)


def test_time_goes_to_the_innermost() -> None:
    watch = Stopwatch()
    watch.events = [
        *((0.0, "decoder", True), (1.0, "attention", True)),
        *(
            (3.0, "attention", False),
            (3.5, "decoder", False),
            (9.0, "base", True),
            (9.25, "base", False),
        ),
    ]
    if torch.cuda.is_available():
        pytest.skip("moments are events on a GPU")
    assert watch.seconds() == {"decoder": 1.5, "attention": 2.0, "base": 0.25}
    watch.events = [(0.0, "decoder", True), (1.0, "attention", False)]
    with pytest.raises(RuntimeError, match="attention ends"):
        watch.seconds()
