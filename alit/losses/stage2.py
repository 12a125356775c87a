"""Stage 2, pixels: L1, perceptual and adversarial loss of one iteration."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import mse_loss

from ..base import BaseTokens, KLVAEBase, VQGANBase
from ..tokenizer import AdaptiveTokenizer
from .gan import adaptive_weight, hinge_loss
from .structure import structural_similarity

#: d_weight = adaptive weight times this, where the weight is 0 and only its value is logged.
LOGGED_WEIGHT = 0.2


class Weights(NamedTuple):
    """Of the terms beside L1, as published: ``perceptual`` of mean LPIPS, ``l2`` of the mean squared error, ``ssim`` of
    1 - mean SSIM."""

    perceptual: float = 1.0
    l2: float = 0.0
    ssim: float = 0.0


class GeneratorLoss(NamedTuple):
    """``total``, and what it is made of.

    Attributes:
        reconstruction: l1 + weighted perceptual, l2 and ssim terms.
        l1, perceptual, l2, ssim: means, unweighted; ssim is 1 - SSIM; 0 where a term is left out.
        weight: adaptive weight x GAN weight.
        adversarial: -mean of the logits.
        quantization: the quantizer's loss.
        reconstructions: (B, 3, height, width).
    """

    total: Tensor
    reconstruction: Tensor
    l1: Tensor
    perceptual: Tensor
    l2: Tensor
    ssim: Tensor
    weight: Tensor
    adversarial: Tensor
    quantization: Tensor
    reconstructions: Tensor


class DiscriminatorLoss(NamedTuple):
    """``total``, and mean logits of pictures and of reconstructions."""

    total: Tensor
    real: Tensor
    fake: Tensor


def reconstructions(
    model: AdaptiveTokenizer,
    images: Tensor,
    at: Collection[int],
    base: BaseTokens | None = None,
    *,
    through_time: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, pixels (B, 3, height, width) and quantizer loss of the iterations ``at``; nothing after them is computed.

    ``through_time`` as for :meth:`alit.AdaptiveTokenizer.rollout`.

    Raises:
        ValueError: ``at`` is empty or holds what is no iteration; wrong images.
    """
    if not at:
        raise ValueError("at: expected at least one iteration, got none")
    rollout = model.rollout(images, base=base, predict_at=at, through_time=through_time)
    for iteration in rollout:
        if iteration.prediction is not None:
            pixels = model.base_tokenizer.pixels(iteration.prediction.code_BNC, model.config.grid)
            quantized = iteration.bottleneck.quantized
            loss = images.new_zeros(()) if quantized is None else quantized.loss
            yield iteration.index, pixels, loss
        if iteration.index == max(at):
            break


def reconstruct(
    model: AdaptiveTokenizer, images: Tensor, at: int, base: BaseTokens | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels and quantizer loss of one iteration; see :func:`reconstructions`."""
    ((_, pixels, quantization),) = reconstructions(model, images, [at], base)
    return pixels, quantization


def generator_loss(
    model: AdaptiveTokenizer,
    images: Tensor,
    discriminator: nn.Module | None,
    perceptual: nn.Module | None,
    *,
    at: int,
    gan_weight: float,
    base: BaseTokens | None = None,
) -> GeneratorLoss:
    """:func:`pixel_loss` of iteration ``at``."""
    pixels, quantization = reconstruct(model, images, at, base)
    return pixel_loss(
        *(model, images, pixels, quantization, discriminator, perceptual), gan_weight=gan_weight
    )


def pixel_loss(
    model: AdaptiveTokenizer,
    images: Tensor,
    pixels: Tensor,
    quantization: Tensor,
    discriminator: nn.Module | None,
    perceptual: nn.Module | None,
    *,
    gan_weight: float,
    weights: Weights = Weights(),  # noqa: B008 (immutable)
) -> GeneratorLoss:
    """mean|x - r| + mean LPIPS + factor * weight * -mean D(r) + quantizer loss.

    Args:
        pixels: r, reconstructions by ``model`` of ``images`` x; ``quantization`` is the quantizer's loss with them.
        discriminator: in training mode; its gradients from this loss belong to nobody's step. None leaves the term out.
        perceptual: (images, reconstructions) -> (B,); None leaves the term out.
        gan_weight: weight = adaptive weight * gan_weight. 0: factor 0, the term vanishes and is only logged.
        weights: of the other terms; L2 and SSIM are not computed where theirs is 0.
    """
    zero = images.new_zeros(())
    pixels = pixels.to(images.dtype)
    l1 = (images - pixels).abs().mean()
    distance = zero if perceptual is None else perceptual(images, pixels).mean()
    l2 = mse_loss(pixels, images) if weights.l2 else zero
    ssim = 1 - structural_similarity(images, pixels).mean() if weights.ssim else zero
    reconstruction = l1 + weights.perceptual * distance + weights.l2 * l2 + weights.ssim * ssim
    adversarial = weight = zero
    total = reconstruction + quantization
    if discriminator is not None:
        adversarial = -discriminator(pixels).float().mean()
        weight = adaptive_weight(reconstruction, adversarial, last_layer(model))
        weight = weight * (gan_weight if gan_weight > 0 else LOGGED_WEIGHT)
        factor = 1.0 if gan_weight > 0 else 0.0
        total = reconstruction + factor * weight * adversarial + quantization
    terms = (reconstruction, l1, distance, l2, ssim, weight, adversarial, quantization)
    return GeneratorLoss(total, *terms, pixels)


def discriminator_loss(
    images: Tensor, reconstructions: Tensor, discriminator: nn.Module, *, gan_weight: float
) -> DiscriminatorLoss:
    """Hinge loss of the discriminator, pictures first, then (detached) reconstructions; 0 while ``gan_weight`` is 0."""
    real = discriminator(images).float()
    fake = discriminator(reconstructions.detach()).float()
    factor = 1.0 if gan_weight > 0 else 0.0
    return DiscriminatorLoss(factor * hinge_loss(real, fake), real.mean(), fake.mean())


def last_layer(model: AdaptiveTokenizer) -> Parameter:
    """Where gradients are compared: the base decoder's last convolution, as published.

    Where the base is frozen or has no weights: the decoder's last layer, which is the last that is trained.
    """
    base = model.base_tokenizer
    if isinstance(base, VQGANBase):
        weight = base.get_parameter("vqgan.decoder.conv_out.weight")
    elif isinstance(base, KLVAEBase):
        weight = base.get_parameter("vae.decoder.conv_out.weight")
    else:
        return model.decoder.get_parameter("ffn.2.weight")
    return weight if weight.requires_grad else model.decoder.get_parameter("ffn.2.weight")
