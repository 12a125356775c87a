"""Shared by the benchmarks of model paths: ``tiny`` on the published VQGAN with random weights, and images."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from alit import AdaptiveTokenizer, TransformerConfig, VQGANConfig
from alit.base import VQGANBase
from alit.config import AdaptiveTokenizerConfig
from alit.training.stage import precision

from ..harness.contest import DEVICE

GPU = DEVICE == "cuda"
#: True if ``alit train`` would choose bfloat16 here.
NATIVE_BFLOAT16 = precision("auto", torch.device(DEVICE)).keywords["enabled"]
#: Tokens of each image: 96 on average.
LENGTHS = (32, 256, 64, 96, 32, 128, 64, 96) if GPU else (32, 160)
ROUNDS = 9 if GPU else 3
WARMUP = 2 if GPU else 0  # the verifying call has warmed it up


@functools.cache
def model(quick: bool, size: str = "tiny") -> AdaptiveTokenizer:
    """Tokenizer on ``DEVICE``, made once; callers set its mode. ``quick``: two narrow layers and 64 x 64 pixels.

    Codes and logits have the spread of trained ones, so that a wrong token shows in the pixels.
    """
    torch.manual_seed(0)
    config = AdaptiveTokenizerConfig.of_size(size, base="vqgan")
    if quick:
        base = VQGANConfig(latent_channels=32, num_codes=64, channels=32, blocks=1)
        width = TransformerConfig(64, 2, 2)
        config = AdaptiveTokenizerConfig(
            base=base, encoder=width, decoder=width, image_size=(64, 64), codebook_size=256
        )
    ours = AdaptiveTokenizer(config)
    assert isinstance(ours.base_tokenizer, VQGANBase)
    with torch.no_grad():
        ours.base_tokenizer.codebook.normal_()
        ours.decoder.ffn[-1].get_parameter("weight").mul_(10)
    return ours.to(DEVICE)


def random_images(ours: AdaptiveTokenizer, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *ours.config.image_size, generator=generator).to(DEVICE)
