"""The two linear layers of a transformer block with the GELU between them, forward and backward.

float32 on the CPU, bfloat16 on a GPU; the width of ``tiny``, rows of two images' longest sequences (of 32 on a GPU).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit.layers import MLP

from ..harness.contest import DEVICE, Contest, Work, assert_near
from ..peers import libraries
from ..peers.baseline import EagerMLP

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
ROWS, WIDTH = (32 * 513, 512) if GPU else (2 * 513, 512)


CONTENDERS: dict[str, Callable[[MLP], Callable[[Tensor], Tensor]]] = {
    "ours": lambda mlp: mlp,
    "eager": EagerMLP,
    "torch.compile": lambda mlp: libraries.compiled(EagerMLP(mlp)),
}


def contest(rows: int) -> Contest:
    torch.manual_seed(0)
    mlp = MLP(WIDTH).to(DEVICE, DTYPE)
    x = torch.randn(rows, WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grad = torch.randn_like(x)

    def step(
        function: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor
    ) -> list[Tensor]:
        out = function(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad.to(x.dtype))]

    def prepare(name: str) -> Callable[[], list[Tensor]]:
        function = CONTENDERS[name](mlp)
        module = getattr(function, "_orig_mod", function)
        return partial(step, function, list(module.parameters()), x)

    exact = EagerMLP(copy.deepcopy(mlp)).double()
    expected = step(exact, list(exact.parameters()), x.detach().double().requires_grad_())

    weights = 8 * WIDTH**2
    traffic = x.element_size() * (2 * weights + 4 * x.numel())
    return Contest(
        {name: partial(prepare, name) for name in CONTENDERS},
        partial(assert_near, expected=expected, tolerance=2e-2 if GPU else 1e-4),
        Work(traffic, 6 * rows * weights),
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_mlp_step(name: str, race: Callable, quick: bool) -> None:
    rows = 64 if quick else ROWS
    race(f"MLP step {rows} x {WIDTH}", name, lambda: contest(rows))
