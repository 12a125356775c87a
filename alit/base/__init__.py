"""Base tokenizers: images to a grid of 2D tokens and back."""

from ..base_config import BaseConfig, DCTConfig, KLVAEConfig
from ..config import Quirks
from .dct import DCTBase
from .interface import BaseTokenizer, BaseTokens, Prediction
from .vae import KLVAE, KLVAEBase
from .vqgan import VQGAN, VQGANBase


def build_base(config: BaseConfig, quirks: Quirks) -> BaseTokenizer:
    """Build the base tokenizer of a configuration, with random weights where it has any."""
    if isinstance(config, DCTConfig):
        return DCTBase(config)
    return (
        KLVAEBase(config, quirks) if isinstance(config, KLVAEConfig) else VQGANBase(config, quirks)
    )


__all__ = [
    "KLVAE",
    "VQGAN",
    "BaseTokenizer",
    "BaseTokens",
    "DCTBase",
    "KLVAEBase",
    "Prediction",
    "VQGANBase",
    "build_base",
]
