"""Stage 2, pixels: L1, perceptual and adversarial loss of one iteration."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter

from ..base import BaseTokens, KLVAEBase, VQGANBase
from ..rollout import Iteration
from ..tokenizer import AdaptiveTokenizer
from .gan import adaptive_weight, hinge_loss

#: d_weight = adaptive weight times this, where the weight is 0 and only its value is logged.
LOGGED_WEIGHT = 0.2


class GeneratorLoss(NamedTuple):
    """``total``, and what it is made of: reconstruction = L1 + perceptual (both means), weight = adaptive x GAN weight,
    adversarial = -mean of the logits, quantization; ``reconstructions`` (B, 3, height, width)."""

    total: Tensor
    reconstruction: Tensor
    perceptual: Tensor
    weight: Tensor
    adversarial: Tensor
    quantization: Tensor
    reconstructions: Tensor


class DiscriminatorLoss(NamedTuple):
    """``total``, and mean logits of pictures and of reconstructions."""

    total: Tensor
    real: Tensor
    fake: Tensor


def reconstruct(
    model: AdaptiveTokenizer, images: Tensor, at: int, base: BaseTokens | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, height, width) and quantizer loss of iteration ``at``; nothing after it is computed."""
    iteration: Iteration
    for iteration in model.rollout(images, base=base, predict_at=[at]):
        if iteration.index == at:
            break
    assert iteration.prediction is not None
    pixels = model.base_tokenizer.pixels(iteration.prediction.code_BNC, model.config.grid)
    quantized = iteration.bottleneck.quantized
    return pixels, images.new_zeros(()) if quantized is None else quantized.loss


def generator_loss(
    model: AdaptiveTokenizer,
    images: Tensor,
    discriminator: nn.Module,
    perceptual: nn.Module | None,
    *,
    at: int,
    gan_weight: float,
    base: BaseTokens | None = None,
) -> GeneratorLoss:
    """mean|x - r| + mean LPIPS + factor * weight * -mean D(r) + quantizer loss, of iteration ``at``.

    Args:
        discriminator: in training mode; its gradients from this loss belong to nobody's step.
        perceptual: (images, reconstructions) -> (B,); None leaves the term out.
        gan_weight: weight = adaptive weight * gan_weight. 0: factor 0, the term vanishes.
    """
    pixels, quantization = reconstruct(model, images, at, base)
    distance = images.new_zeros(()) if perceptual is None else perceptual(images, pixels).mean()
    reconstruction = (images - pixels).abs().mean() + distance
    adversarial = -discriminator(pixels).mean()
    weight = adaptive_weight(reconstruction, adversarial, last_layer(model))
    weight = weight * (gan_weight if gan_weight > 0 else LOGGED_WEIGHT)
    factor = 1.0 if gan_weight > 0 else 0.0
    total = reconstruction + factor * weight * adversarial + quantization
    return GeneratorLoss(total, reconstruction, distance, weight, adversarial, quantization, pixels)


def discriminator_loss(
    images: Tensor, reconstructions: Tensor, discriminator: nn.Module, *, gan_weight: float
) -> DiscriminatorLoss:
    """Hinge loss of the discriminator, pictures first, then (detached) reconstructions; 0 while ``gan_weight`` is 0."""
    real, fake = discriminator(images), discriminator(reconstructions.detach())
    factor = 1.0 if gan_weight > 0 else 0.0
    return DiscriminatorLoss(factor * hinge_loss(real, fake), real.mean(), fake.mean())


def last_layer(model: AdaptiveTokenizer) -> Parameter:
    """Where gradients are compared: the base decoder's last convolution.

    Raises:
        ValueError: a base tokenizer without weights.
    """
    base = model.base_tokenizer
    if isinstance(base, VQGANBase):
        return base.get_parameter("vqgan.decoder.conv_out.weight")
    if isinstance(base, KLVAEBase):
        return base.get_parameter("vae.decoder.conv_out.weight")
    raise ValueError("model: expected a base tokenizer with weights (vqgan or vae) for stage 2")
