"""The convolutional halves of base tokenizers: the layout in memory, and that it changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alit.base.convolution import ConvDecoder, ConvEncoder

SIZE: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks": 1}


def halves(plain: bool, stem: int) -> list[tuple[nn.Module, torch.Tensor]]:
    attends = () if plain else (1,)
    encoder = ConvEncoder(6, plain=plain, stem=stem, attention_levels=attends, **SIZE)
    decoder = ConvDecoder(6, plain=plain, stem=stem, **SIZE)
    return [(encoder, torch.randn(2, 3, 16, 16)), (decoder, torch.randn(2, 6, 8, 8))]


@pytest.mark.parametrize("plain, stem", ((True, 1), (False, 1), (False, 2)))
def test_channels_last_where_no_gradient_is_asked_for(plain: bool, stem: int) -> None:
    layouts: list[bool] = []

    def watch(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for half, x in halves(plain, stem):
        for layer in half.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.register_forward_pre_hook(watch)
        layouts.clear()
        learning = half(x)
        assert learning.requires_grad and not any(layouts)
        layouts.clear()
        with torch.no_grad():
            without = half(x)
        assert layouts and all(layouts)
        torch.testing.assert_close(without, learning, rtol=1e-4, atol=1e-5)
        assert without.is_contiguous() and learning.is_contiguous()
        layouts.clear()
        half.requires_grad_(False)
        half(x)
        assert all(layouts), "a frozen half"
        half(x.requires_grad_()).sum().backward()
        assert not layouts[-1], "a gradient of its input"
