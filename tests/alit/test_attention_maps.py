"""Attention maps of latents against the softmax written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer
from alit.attention_maps import latent_attention
from tests.helpers.models import images, model


def explicit(m: AdaptiveTokenizer, x: Tensor, layer: int, grid: tuple[int, int] = (4, 6)) -> Tensor:
    """Attention of ``layer`` for the encoder's input (B, S, D): latents to image tokens, mean over heads."""
    for block in list(m.encoder.transformer)[:layer]:
        x, _ = block(x)
    block = m.encoder.transformer[layer]
    heads = block.attn.heads
    qkv = torch.nn.functional.linear(
        block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias
    )
    q, k, _ = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    n = 1 + math.prod(grid)
    return weights[:, n:, 1:n].unflatten(-1, grid)


@torch.no_grad()
@pytest.mark.parametrize("iteration", [0, 2])
def test_equals_softmax(iteration: int) -> None:
    m, x = model(), images()
    rollout = m.rollout(x)
    for _ in range(iteration):
        next(rollout)
    expected = [explicit(m, rollout.tokens_BSD, layer) for layer in (0, 1)]
    for layer in (0, 1):
        maps = latent_attention(m, x, iteration=iteration, layer=layer)
        assert maps.shape == (3, 3 * (iteration + 1), 4, 6)
        torch.testing.assert_close(maps, expected[layer], atol=2e-6, rtol=1e-5)
    mean = latent_attention(m, x, iteration=iteration)
    torch.testing.assert_close(mean, (expected[0] + expected[1]) / 2, atol=2e-6, rtol=1e-5)
    assert mean.sum((2, 3)).max() < 1 and (mean > 0).all()
    assert latent_attention(m, x).shape == (3, 12, 4, 6)  # the last iteration by default


@torch.no_grad()
def test_final_tokens_looked_in_their_own_iteration() -> None:
    m, x = model(recurrence="residual", codebooks="each"), images()
    rollout, expected = m.rollout(x), []
    for iteration in range(4):
        expected.append(explicit(m, rollout.tokens_BSD, 1))
        maps = latent_attention(m, x, iteration=iteration, layer=1)
        torch.testing.assert_close(maps, torch.cat(expected, 1), atol=2e-6, rtol=1e-5)
        next(rollout)
    assert latent_attention(m, x).shape == (3, 12, 4, 6)


@torch.no_grad()
def test_images_of_another_size() -> None:
    m, x = model(), torch.rand(2, 3, 20, 8)
    rollout = m.rollout(x, places=m.places((5, 2)))
    expected = explicit(m, rollout.tokens_BSD, 1, (5, 2))
    maps = latent_attention(m, x, iteration=0, layer=1)
    assert maps.shape == (2, 3, 5, 2)
    torch.testing.assert_close(maps, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 18, 8), (3, 16, 24)])
def test_images_of_no_size_that_the_model_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images: expected"):
        latent_attention(model(), torch.rand(shape))


@pytest.mark.parametrize("name, value", [("iteration", 4), ("iteration", -1), ("layer", 2)])
def test_bad_arguments(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected one of 0.."):
        latent_attention(model(), images(), **{name: value})


def test_dropped_tokens_have_no_place() -> None:
    with pytest.raises(ValueError, match="halting='drop'"):
        latent_attention(model("vqgan", halting="drop"), images())
