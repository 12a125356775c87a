"""A residual connection and the layer norm after it: forward and backward, the branch in bfloat16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from alit_kernels import add_layer_norm
from alit_kernels.add_layer_norm.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import DEVICE, Contest, Work
from ..peers import libraries

CASE, QUICK = BENCHMARK_CASES[0], Case((4, 33, 64))
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def eager(
    x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = x + (branch + branch_bias)
    return total, layer_norm(total, weight.shape, weight, bias).to(dtype)


def ours(*tensors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return add_layer_norm(*tensors, dtype=dtype)


CONTENDERS: dict[str, Callable[[], Callable[..., tuple[Tensor, Tensor]]]] = {
    "ours": lambda: ours,
    "eager": lambda: eager,
    "torch.compile": lambda: libraries.compiled(eager),
}


def contest(case: Case) -> Contest:
    leaves = [t.requires_grad_() for t in make(case, branch_dtype=HALF, device=DEVICE)]
    factors = torch.randn(2, *case.shape, device=DEVICE)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        total, normalized = function(*leaves, dtype=HALF)
        grads = torch.autograd.grad(
            (total, normalized), leaves, (factors[0], factors[1].to(normalized.dtype))
        )
        return (total.detach(), normalized.detach(), *grads)

    expected, share = step(eager), 1e-4 if torch.float32 == HALF else 2e-2

    def check(found: tuple[Tensor, ...]) -> None:
        """Check each tensor to a share of its largest magnitude: gradients of the vectors are sums over all rows."""
        for ours, theirs in zip(found, expected, strict=True):
            bound = share * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)

    numbers = factors[0].numel()
    return Contest(
        {n: lambda f=f: partial(step, f()) for n, f in CONTENDERS.items()},
        check,
        Work(numbers * (4 * 5 + 4 * HALF.itemsize)),
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_add_layer_norm_step(name: str, race: Callable, quick: bool) -> None:
    case = QUICK if quick else CASE
    race(f"add_layer_norm step {' x '.join(map(str, case.shape))}", name, lambda: contest(case))
