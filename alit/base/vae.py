"""KL-VAE base tokenizer, in the layout of latent diffusion's autoencoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base_config import KLVAEConfig
from ..config import Quirks
from .convolution import ConvDecoder, ConvEncoder
from .dct import BlockDCT
from .interface import BaseTokens, ContinuousBase, to_grid


class Posterior(NamedTuple):
    """Diagonal Gaussian: mean and log-variance (clamped to [-30, 20]), each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over C, H, W: (B,) nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


class KLVAE(nn.Module):
    """KL-VAE: encoder to a posterior, decoder from (unscaled) latents; images in [-1, 1]."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        latents = config.latent_channels
        layout: dict[str, Any] = {
            "channels": config.channels,
            "multipliers": config.multipliers,
            "stem": config.stem,
            "plain": False,
        }
        attention = config.attention_levels
        self.encoder = ConvEncoder(
            2 * latents, blocks=config.blocks, attention_levels=attention, **layout
        )
        self.decoder = ConvDecoder(latents, blocks=config.blocks + 1, **layout)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.transform = None
        if config.transform:
            chroma = round(3 / 16 * latents)
            counts = (latents - 2 * chroma, chroma, chroma)
            self.transform = BlockDCT(config.patch_size, counts, span=2.0)
            # Training starts from the transform alone, hardly blurred by noise.
            for layer in (self.quant_conv, self.decoder.conv_out):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
            nn.init.constant_(self.quant_conv.get_parameter("bias")[latents:], -8.0)

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        if self.transform is not None:
            mean = mean + self.transform(images)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        images = self.decoder(self.post_quant_conv(latents_BCHW))
        return images if self.transform is None else images + self.transform.inverse(latents_BCHW)


class KLVAEBase(ContinuousBase):
    """Base tokenizer whose tokens and targets are a KL-VAE's scaled latents; images in [0, 1], the VAE's in [-1, 1]."""

    def __init__(self, config: KLVAEConfig, quirks: Quirks) -> None:
        super().__init__()
        self.vae = KLVAE(config)
        self.outputs = config.latent_channels
        self.scale = config.scale
        self.unit_range, self.scaled_decoding = quirks.vae_unit_range, quirks.vae_scaled_decoding

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        posterior = self._posterior(images)
        if not sample:
            return self.tokens(posterior.mean * self.scale)
        noise = torch.randn(
            posterior.mean.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        return self.tokens(posterior.sample(noise) * self.scale)

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions from a posterior sample, and the KL divergence in nats per pixel value."""
        posterior = self._posterior(images)
        latents = posterior.sample(torch.randn_like(posterior.mean))
        divergence = Posterior(posterior.mean.float(), posterior.logvar.float()).kl()
        pixels = self._decoded(latents * self.scale if self.scaled_decoding else latents)
        return pixels, divergence.sum() / images.numel()

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        latents = to_grid(code_BNC, grid)
        return self._decoded(latents if self.scaled_decoding else latents / self.scale)

    def _posterior(self, images: Tensor) -> Posterior:
        return self.vae.encode(images if self.unit_range else 2 * images - 1)

    def _decoded(self, latents_BCHW: Tensor) -> Tensor:
        images = self.vae.decode(latents_BCHW)
        return images if self.unit_range else (images + 1) / 2
