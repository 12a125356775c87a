"""Expected code, negative log-likelihood and true-code probability: forward and backward, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit_kernels import soft_codebook
from alit_kernels.soft_codebook.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import DEVICE, Contest, Work
from ..peers import eager, libraries

CASE, QUICK = BENCHMARK_CASES[0], Case(512, 256, 64)
Parts = tuple[Tensor, ...]

CONTENDERS: dict[str, Callable[[], Callable[..., Parts]]] = {
    "ours": lambda: soft_codebook,
    "eager": lambda: eager.soft_codebook,
    "torch.compile": lambda: libraries.compiled(eager.soft_codebook),
}


def contest(case: Case) -> Contest:
    logits, codebook, target = make(case, device=DEVICE)
    leaves = (logits.requires_grad_(), codebook.requires_grad_())
    weights = torch.randn(case.rows, case.channels, device=DEVICE)

    def step(function: Callable[..., Parts]) -> Parts:
        code, nll, p_target = function(*leaves, target)
        loss = (code * weights).sum() + nll.sum()
        forward = code.detach(), nll.detach(), p_target.detach()
        return (*torch.autograd.grad(loss, leaves), *forward)

    expected = step(eager.soft_codebook)
    return Contest(
        {n: lambda f=f: partial(step, f()) for n, f in CONTENDERS.items()},
        partial(torch.testing.assert_close, expected=expected, rtol=1e-3, atol=1e-4),
        Work(
            4 * (3 * logits.numel() + 2 * codebook.numel() + 3 * weights.numel()),
            6 * case.rows * case.codes * case.channels,
        ),
    )


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", BENCHMARK_CASES, ids=lambda c: f"{c.rows}x{c.codes}x{c.channels}")
def test_soft_codebook_step(case: Case, name: str, race: Callable, quick: bool) -> None:
    if quick and case != CASE:
        pytest.skip("--quick runs one shape")
    case = QUICK if quick else case
    group = f"soft_codebook step {case.rows} x {case.codes} x {case.channels}"
    race(group, name, lambda: contest(case))
