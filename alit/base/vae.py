"""KL-VAE base tokenizer, in the layout of latent diffusion's autoencoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from ..config import KLVAEConfig, Quirks
from .convolution import ConvDecoder, ConvEncoder
from .dct import dct_filters
from .interface import BaseTokenizer, BaseTokens, Prediction, to_grid, to_rows


class Posterior(NamedTuple):
    """Diagonal Gaussian: mean and log-variance (clamped to [-30, 20]), each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, summed over C, H, W: (B,) nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


class KLVAE(nn.Module):
    """Encoder to a posterior, decoder from (unscaled) latents."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        latents = config.latent_channels
        channels, multipliers, blocks = config.channels, config.multipliers, config.blocks
        self.encoder = ConvEncoder(
            2 * latents,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
            plain=False,
            attention_levels=config.attention_levels,
            stem=config.stem,
        )
        self.decoder = ConvDecoder(
            latents,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks + 1,
            plain=False,
            stem=config.stem,
        )
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.transform = BlockTransform(config) if config.transform else None
        if config.transform:  # at first the transform alone, hardly blurred by noise
            with torch.no_grad():
                for parameter in (
                    *self.quant_conv.parameters(),
                    *self.decoder.conv_out.parameters(),
                ):
                    parameter.zero_()
                self.quant_conv.get_parameter("bias")[latents:] = -8.0

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        if self.transform is not None:
            mean = mean + self.transform.analysis(images)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        images = self.decoder(self.post_quant_conv(latents_BCHW))
        if self.transform is not None:
            images = images + self.transform.synthesis(latents_BCHW)
        return images


class BlockTransform(nn.Module):
    """Patches of images in [-1, 1] to their lowest DCT coefficients, scaled as in :class:`.dct.DCTBase`, and back."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        latents, self.patch_size = config.latent_channels, config.patch_size
        chroma = round(3 / 16 * latents)
        filters = dct_filters(self.patch_size, (latents - 2 * chroma, chroma, chroma))
        self.forward_filters: Tensor
        self.inverse_filters: Tensor
        self.register_buffer("forward_filters", filters[0] / 2, persistent=False)
        self.register_buffer("inverse_filters", filters[1] * 2, persistent=False)

    def analysis(self, images: Tensor) -> Tensor:
        return conv2d(images, self.forward_filters.to(images.dtype), stride=self.patch_size)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        filters = self.inverse_filters.to(coefficients.dtype)
        return conv_transpose2d(coefficients, filters, stride=self.patch_size)


class KLVAEBase(BaseTokenizer):
    """Tokens and targets are scaled latents. Images are moved from [0, 1] to the [-1, 1] of the VAE, and back."""

    def __init__(self, config: KLVAEConfig, quirks: Quirks) -> None:
        super().__init__()
        self.vae = KLVAE(config)
        self.outputs = config.latent_channels
        self.scale = config.scale
        self.unit_range, self.scaled_decoding = quirks.vae_unit_range, quirks.vae_scaled_decoding

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        posterior = self.vae.encode(images if self.unit_range else 2 * images - 1)
        if not sample:
            return self.tokens(posterior.mean * self.scale)
        noise = torch.randn(
            posterior.mean.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        return self.tokens(posterior.sample(noise) * self.scale)

    def tokens(self, latents_BCHW: Tensor) -> BaseTokens:
        """Base tokens of scaled latents that the encoder gave earlier."""
        return BaseTokens(latents_BCHW, to_rows(latents_BCHW), None)

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """From a posterior sample; the term is the KL divergence in nats per pixel value."""
        posterior = self.vae.encode(images if self.unit_range else 2 * images - 1)
        latents = posterior.sample(torch.randn_like(posterior.mean))
        decoded = self.vae.decode(latents * self.scale if self.scaled_decoding else latents)
        divergence = Posterior(posterior.mean.float(), posterior.logvar.float()).kl()
        return decoded if self.unit_range else (decoded + 1) / 2, divergence.sum() / images.numel()

    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        return Prediction(decoded_BNV, decoded_BNV)

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        latents = to_grid(code_BNC, grid)
        images = self.vae.decode(latents if self.scaled_decoding else latents / self.scale)
        return images if self.unit_range else (images + 1) / 2
