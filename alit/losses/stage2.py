"""Stage 2, pixels: L1, perceptual and adversarial loss of one iteration."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import mse_loss

from ..base import BaseTokens, KLVAEBase, VQGANBase
from ..pixel_errors import structural_similarity
from ..tokenizer import AdaptiveTokenizer
from .gan import adaptive_weight, hinge_loss
from .tails import check_tails, kept_lengths


class Reconstruction(NamedTuple):
    """Reconstruction after one iteration: its number, pixels (B, 3, height, width), the quantizer's loss (None without
    a quantizer) and the mean squared error of the code.
    """

    iteration: int
    pixels: Tensor
    quantization: Tensor | None
    code: Tensor


class Weights(NamedTuple):
    """Weights of the terms beside L1, as published: ``perceptual`` of mean LPIPS, ``l2`` of the mean squared error,
    ``ssim`` of 1 - mean SSIM."""

    perceptual: float = 1.0
    l2: float = 0.0
    ssim: float = 0.0


def reconstructions(
    model: AdaptiveTokenizer,
    images: Tensor,
    at: Collection[int],
    base: BaseTokens | None = None,
    *,
    through_time: bool = True,
    tail_drop: float = 0.0,
) -> Iterator[Reconstruction]:
    """Yield the reconstructions of the iterations ``at``; nothing after them is computed.

    ``through_time`` as for :meth:`alit.AdaptiveTokenizer.rollout`,
    ``tail_drop`` as for :func:`alit.losses.stage1_loss`.

    Raises:
        ValueError: ``at`` is empty or holds a number that is no iteration; wrong images; ``tail_drop`` is no
            probability, or tokens halt.
    """
    check_tails(model, tail_drop)
    if not at:
        raise ValueError("at: expected at least one iteration, got none")
    rollout = model.rollout(
        images,
        base=base,
        predict_at=at,
        through_time=through_time,
        predict_later=tail_drop > 0,
        iterations=max(at) + 1,
    )
    for iteration in rollout:
        prediction = iteration.prediction
        if tail_drop and iteration.index in at:
            lengths_B = kept_lengths(iteration, model.config.latents_per_iteration, tail_drop)
            codes_BLC = iteration.bottleneck.codes_BLC
            prediction = model.predict(codes_BLC, iteration.base.target_BN, lengths_B)
        if prediction is not None:
            pixels = model.pixels(prediction)
            code = mse_loss(prediction.code_BNC.float(), iteration.base.code_BNC.float())
            loss = iteration.bottleneck.loss
            yield Reconstruction(iteration.index, pixels.to(images.dtype), loss, code)


def pixel_loss(
    model: AdaptiveTokenizer,
    images: Tensor,
    pixels: Tensor,
    quantization: Tensor | None,
    discriminator: nn.Module | None,
    perceptual: nn.Module | None,
    *,
    gan_weight: float,
    weights: Weights = Weights(),  # noqa: B008 (immutable)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss mean|x - r| + weighted other terms + weight * -mean D(r) + quantizer loss, and its terms by name.

    The terms are means, unweighted: ``l1``, ``perceptual``, ``l2``, ``ssim`` (1 - SSIM), ``quantization``,
    ``adversarial`` (-mean of the logits) and ``weight`` (adaptive weight x GAN weight). A term that is left out is
    not among them, and not computed.

    Args:
        pixels: r, reconstructions by ``model`` of ``images`` x; ``quantization`` is the quantizer's loss with them.
        discriminator: in training mode; its gradients from this loss are for no optimizer. None leaves the term out.
        perceptual: (images, reconstructions) -> (B,); None leaves the term out.
        gan_weight: weight = adaptive weight * gan_weight.
        weights: of the other terms; L2 and SSIM are left out where theirs is 0.
    """
    terms = {"l1": (images - pixels).abs().mean()}
    if perceptual is not None:
        terms["perceptual"] = perceptual(images, pixels).mean()
    if weights.l2:
        terms["l2"] = mse_loss(pixels, images)
    if weights.ssim:
        terms["ssim"] = 1 - structural_similarity(images, pixels).mean()
    total = terms["l1"]
    for name, factor in weights._asdict().items():
        if name in terms:
            total = total + factor * terms[name]
    if quantization is not None:
        terms["quantization"] = quantization
    if discriminator is not None:
        adversarial = -discriminator(pixels).float().mean()
        weight = adaptive_weight(total, adversarial, last_layer(model)) * gan_weight
        terms |= {"adversarial": adversarial, "weight": weight}
        total = total + weight * adversarial
    return total if quantization is None else total + quantization, terms


def discriminator_loss(
    images: Tensor, reconstructions: Tensor, discriminator: nn.Module
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss of the discriminator, images first, then (detached) reconstructions; and the mean logits of both,
    ``real`` and ``fake``.
    """
    real = discriminator(images).float()
    fake = discriminator(reconstructions.detach()).float()
    return hinge_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}


def last_layer(model: AdaptiveTokenizer) -> Parameter:
    """Parameter at which gradient norms are compared: the base decoder's last convolution, as published.

    With a pixel filter: its last layer. Else, where the base is frozen or has no weights: the decoder's last layer.
    """
    if model.pixel_filter is not None:
        return model.get_parameter("pixel_filter.last.weight")
    networks = {VQGANBase: "vqgan", KLVAEBase: "vae"}
    if (network := networks.get(type(model.base_tokenizer))) is not None:
        weight = model.base_tokenizer.get_parameter(f"{network}.decoder.conv_out.weight")
        if weight.requires_grad:
            return weight
    return model.decoder.get_parameter("ffn.2.weight")
