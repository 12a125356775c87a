"""VQGAN base tokenizer, in the layout of MaskGIT's tokenizer (keys ``vqgan.{encoder,decoder,quantize}``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alit_kernels import VectorQuantized, nearest_codeword, soft_codebook
from alit_kernels.nn import VectorQuantizer

from ..base_config import VQGANConfig
from ..config import Quirks
from .convolution import ConvDecoder, ConvEncoder
from .interface import BaseTokenizer, BaseTokens, Prediction, to_grid, to_rows


class VQGAN(nn.Module):
    """VQGAN: encoder, quantizer and decoder; images in [0, 1]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        layout: dict[str, Any] = {
            "channels": config.channels,
            "multipliers": config.multipliers,
            "blocks": config.blocks,
        }
        self.encoder = ConvEncoder(config.latent_channels, plain=True, **layout)
        self.decoder = ConvDecoder(config.latent_channels, plain=True, **layout)
        self.quantize = VectorQuantizer(
            config.num_codes, config.latent_channels, commitment=1.0, codebook_weight=0.25
        )

    def quantized(self, z_BCHW: Tensor) -> tuple[VectorQuantized, Tensor]:
        """Quantized features (B, N, C), and the loss mean((sg(q) - z)^2) + 0.25 mean((q - sg(z))^2), as trained."""
        result = self.quantize(to_rows(z_BCHW))
        return result, result.loss


class VQGANBase(BaseTokenizer):
    """Base tokenizer whose tokens are a VQGAN's features before quantization, and targets the nearest codes' ids."""

    def __init__(self, config: VQGANConfig, quirks: Quirks) -> None:
        super().__init__()
        self.vqgan = VQGAN(config)
        self.outputs = config.num_codes
        self.detach_codebook = quirks.detached_base_codebook

    @property
    def codebook(self) -> Tensor:
        return self.vqgan.quantize.embedding.weight

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        return self.tokens(self.vqgan.encoder(images))

    def tokens(self, z_BCHW: Tensor) -> BaseTokens:
        """Base tokens of features that the encoder gave earlier."""
        rows = to_rows(z_BCHW)
        target_BN = nearest_codeword(rows.flatten(0, 1), self.codebook).view(rows.shape[:2])
        return BaseTokens(z_BCHW, self.codebook[target_BN], target_BN)

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions from the nearest codes, straight-through, and the quantizer loss."""
        z_BCHW = self.vqgan.encoder(images)
        quantized, loss = self.vqgan.quantized(z_BCHW)
        return self.pixels(quantized.quantized, (z_BCHW.shape[2], z_BCHW.shape[3])), loss

    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        codebook = self.codebook.detach() if self.detach_codebook else self.codebook
        target = None if target_BN is None else target_BN.flatten()
        soft = soft_codebook(decoded_BNV.flatten(0, 1), codebook, target)
        nll, p_target = (
            None if x is None else x.view(decoded_BNV.shape[:2]) for x in (soft.nll, soft.p_target)
        )
        code_BNC = soft.code.unflatten(0, decoded_BNV.shape[:2])
        return Prediction(decoded_BNV, code_BNC, nll, p_target)

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.vqgan.decoder(to_grid(code_BNC, grid))
