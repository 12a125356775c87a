"""A quantizer's training step, forward and backward, cosine metric, learned codebook, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit_kernels.nn import VectorQuantizer
from alit_kernels.vector_quantize.cases import Case, make

from ..harness.contest import DEVICE, Contest, Work
from ..peers import eager, libraries

#: Tokens, codes and dimension: 32 pictures of 256 tokens.
STEP = Case(32 * 256, 4096, 12)
QUICK = Case(4 * 256, 512, 12)
Step = Callable[[], tuple[Tensor, ...]]


def ours(z: Tensor, codebook: Tensor) -> Step:
    module = VectorQuantizer(*codebook.shape, metric="cosine").to(z.device)
    module.embedding.weight = torch.nn.Parameter(codebook.detach().clone())

    def step() -> tuple[Tensor, ...]:
        result = module(z)
        loss = result.loss + result.quantized.square().mean()
        return with_gradients(loss, z, module.embedding.weight)

    return step


def with_gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def eager_loss(z: Tensor, codebook: Tensor, with_one_hot: bool) -> Tensor:
    result = eager.vector_quantize(z, codebook, "cosine", with_one_hot=with_one_hot)
    return result.loss + result.quantized.square().mean()


def in_eager(loss: Callable[..., Tensor], with_one_hot: bool, z: Tensor, codebook: Tensor) -> Step:
    return lambda: with_gradients(loss(z, codebook, with_one_hot), z, codebook)


def library(z: Tensor, codebook: Tensor) -> Step:
    quantize = libraries.vector_quantize_pytorch(codebook, "cosine")

    def step() -> tuple[Tensor, ...]:
        quantized, loss = quantize(z)
        return torch.autograd.grad(loss + quantized.square().mean(), (z,))

    return step


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Step]] = {
    "ours": ours,
    "eager, one-hot": partial(in_eager, eager_loss, True),
    "eager, gather": partial(in_eager, eager_loss, False),
    "torch.compile": lambda *inputs: in_eager(libraries.compiled(eager_loss), False, *inputs),
    "vector-quantize-pytorch": library,
}


def contest(case: Case) -> Contest:
    z, codebook, _ = make(case, device=DEVICE)
    z = z.view(-1, 256, case.dim).requires_grad_()
    codebook.requires_grad_()
    expected = CONTENDERS["eager, gather"](z, codebook)()

    def verify(found: tuple[Tensor, ...]) -> None:
        # The library weighs its losses otherwise: of its gradient only the shape and that it is finite can be held.
        if len(found) == 1:
            assert found[0].shape == z.shape and bool(found[0].isfinite().all())
            return
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)

    return Contest(
        {name: partial(prepare, z, codebook) for name, prepare in CONTENDERS.items()},
        verify,
        Work(4 * (3 * z.numel() + 2 * codebook.numel()), 2 * case.vectors * case.codes * case.dim),
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_vector_quantizer_step(name: str, race: Callable, quick: bool) -> None:
    case = QUICK if quick else STEP
    group = f"VectorQuantizer step {case.vectors} x {case.codes} x {case.dim}"
    race(group, name, lambda: contest(case))
