"""Steps, comparisons and timing for the integration tests: models of other packages before and after ``accelerate``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TURNS = 5


def leaves_of(result: Any) -> list[Any]:
    if isinstance(result, dict):
        return leaves_of(list(result.values()))
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in leaves_of(part)]
    return [result]


def step(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[Any], float]:
    """Outputs with gradients of input and parameters, and the seconds of a step with gradient descent."""
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    start = time.perf_counter()
    outputs = leaves_of(model(leaf, **options))
    losses = [v.square().mean() for v in outputs if isinstance(v, Tensor) and v.requires_grad]
    gradients = []
    if losses:
        sum(losses).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
                    gradients.append(p.grad)
                    p.grad = None
    return [*outputs, leaf.grad, *gradients], time.perf_counter() - start


def compare(found: list[Any], expected: list[Any], what: str) -> None:
    """Check that results are equal, floats to 1e-5 of the largest magnitude of each tensor."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if not isinstance(a, Tensor):
            assert type(a) is type(b), what
        elif not a.is_floating_point():
            assert torch.equal(a, b), what
        else:
            assert a.requires_grad == b.requires_grad, what
            if a.numel():
                scale = max(float(b.detach().abs().max()), 1e-3)
                torch.testing.assert_close(
                    a, b, rtol=0, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}"
                )


def time_in_turns(
    name: str,
    after: Callable[[], float],
    before: Callable[[], float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Print the medians of the seconds that ``after`` and ``before`` return, and their ratio."""
    times = [(after(), before()) for _ in range(TURNS)]
    mine, others = (sorted(each)[TURNS // 2] for each in zip(*times, strict=True))
    with capsys.disabled():
        print(
            f"\n{name}: {others * 1e3:.1f} ms before, {mine * 1e3:.1f} ms after ({others / mine:.2f})"
        )
