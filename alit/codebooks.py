"""Quantization of latents by one shared codebook, or by that of the iteration which added the token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alit_kernels import VectorQuantized
from alit_kernels.nn import VectorQuantizer

from .config import AdaptiveTokenizerConfig


class CodebookPerIteration(nn.ModuleList):
    """Quantizer with a codebook for each run of ``latents_per_iteration`` tokens; an index counts within its codebook.

    Dead codes are replaced, and moving averages kept, in each codebook separately.
    """

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        super().__init__(vector_quantizer(config) for _ in range(config.iterations))
        self.step = config.latents_per_iteration

    def forward(self, z_BLC: Tensor, first: int = 0) -> VectorQuantized:
        """Quantize tokens (B, L, C) from position ``first``, a multiple of ``step``; losses are means over tokens."""
        parts = z_BLC.split(self.step, dim=1)
        own = list(self)[first // self.step :][: len(parts)]
        found = [quantizer(z) for quantizer, z in zip(own, parts, strict=True)]
        if len(found) == 1:
            return found[0]
        share = [z.shape[1] / z_BLC.shape[1] for z in parts]
        losses = zip(*((x.loss, x.commitment_loss, x.codebook_loss) for x in found), strict=True)
        means = (sum(a * x for a, x in zip(share, each, strict=True)) for each in losses)
        quantized, index = (
            torch.cat(x, 1) for x in zip(*((x.quantized, x.index) for x in found), strict=True)
        )
        return VectorQuantized(quantized, index, *means)

    def codes(self, index_BL: Tensor) -> Tensor:
        """Codes (B, L, C) of indices (B, L) from position 0 on."""
        parts = index_BL.split(self.step, dim=1)
        own = list(self)[: len(parts)]
        pairs: Any = zip(own, parts, strict=True)
        found = [quantizer.codes(x) for quantizer, x in pairs]
        return torch.cat(found, dim=1)


def vector_quantizer(config: AdaptiveTokenizerConfig) -> VectorQuantizer:
    """Vector quantizer with one codebook, as configured."""
    return VectorQuantizer(
        config.codebook_size,
        config.code_dim,
        metric=config.metric,
        commitment=config.commitment,
        ema_decay=config.ema_decay,
        ema_rewrites_all=config.quirks.ema_rewrites_all_codes,
        dead_code_threshold=config.dead_code_threshold,
    )
