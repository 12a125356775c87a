"""Convolutional encoders and decoders of base tokenizers: in-place operations change neither results nor inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alit.base.convolution import ConvDecoder, ConvEncoder

SIZE: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks": 2}


def halves(plain: bool, stem: int) -> list[tuple[nn.Module, torch.Tensor]]:
    attends = () if plain else (1,)
    encoder = ConvEncoder(6, plain=plain, stem=stem, attention_levels=attends, **SIZE)
    decoder = ConvDecoder(6, plain=plain, stem=stem, **SIZE)
    return [(encoder, torch.randn(2, 3, 16, 16)), (decoder, torch.randn(2, 6, 8, 8))]


@pytest.mark.parametrize("plain, stem", ((True, 1), (False, 1), (False, 2)))
def test_the_same_bits_with_and_without_gradients(plain: bool, stem: int) -> None:
    for half, x in halves(plain, stem):
        before = x.clone()
        learning = half(x)
        assert learning.requires_grad
        with torch.no_grad():
            without = half(x)
        frozen = half.requires_grad_(False)(x)
        of_input = half(x.requires_grad_())
        for result in (without, frozen, of_input):
            assert torch.equal(result, learning)
        assert torch.equal(x, before)
        of_input.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
