"""Small models for tests, of every base and variant, with random weights that are not trivially small."""

from __future__ import annotations

from typing import Any

import torch

from alit import (
    AdaptiveTokenizer,
    AdaptiveTokenizerConfig,
    DCTConfig,
    KLVAEConfig,
    TransformerConfig,
    VQGANConfig,
)
from alit.base_config import BaseConfig
from alit_kernels.testing import assert_exact_nearest

BASES: dict[str, BaseConfig] = {
    "vqgan": VQGANConfig(
        latent_channels=8, num_codes=16, channels=32, multipliers=(1, 1, 1), blocks=1
    ),
    "vae": KLVAEConfig(
        latent_channels=4, channels=32, multipliers=(1, 1, 1), blocks=1, attention_levels=(2,)
    ),
    "dct": DCTConfig(patch_size=4, luma=5, chroma=2),
}
VARIANTS = ("quantized", "continuous", "unfactorized")


def config(base: str | BaseConfig = "dct", **options: Any) -> AdaptiveTokenizerConfig:
    """Config of a small model: 4 x 6 patches of 4 x 4 pixels, 4 iterations of 3 latents, 32 codes of 6 channels."""
    fields: dict[str, Any] = {
        "encoder": TransformerConfig(32, 2, 2),
        "decoder": TransformerConfig(32, 2, 2),
        "image_size": (16, 24),
        "latents_per_iteration": 3,
        "iterations": 4,
        "codebook_size": 32,
        "code_dim": 6,
    }
    described = BASES[base] if isinstance(base, str) else base
    return AdaptiveTokenizerConfig(base=described, **{**fields, **options})


def model(base: str | BaseConfig = "dct", *, seed: int = 0, **options: Any) -> AdaptiveTokenizer:
    """Small model in evaluation mode; matrices have standard deviation 1 / sqrt(fan-in), so that outputs vary."""
    torch.manual_seed(seed)
    result = AdaptiveTokenizer(config(base, **options))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.ndim >= 2 and not name.endswith(("_embedding", "_token", "_tokens")):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return result.eval()


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 24, generator=generator)


def same_indices(
    m: AdaptiveTokenizer, batched: torch.Tensor, single: torch.Tensor, latents: torch.Tensor
) -> None:
    """Check that indices are equal, except where both are nearest within the exactness bound."""
    differ = batched != single
    if bool(differ.any()):
        z = torch.nn.functional.normalize(latents[differ].float(), dim=-1)
        codes = torch.nn.functional.normalize(m.quantize.embedding.weight, dim=-1)
        assert_exact_nearest(batched[differ], z, codes)
