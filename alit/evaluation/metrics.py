"""Quality of images, bits of tokens, and the baseline that a tokenizer has to beat: thumbnails.

Images are float tensors (..., 3, height, width) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..config import AdaptiveTokenizerConfig
from ..losses import structural_similarity

#: Bits per channel of a thumbnail.
DEPTH = 4


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each pair: (...) in the images' dtype."""
    return (a - b).abs().mean((-3, -2, -1))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each pair in decibels, at most 100, for equal ones: (...) float64."""
    return -10 * (a - b).double().square().mean((-3, -2, -1)).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, (B,) float64, see :func:`alit.losses.structural_similarity`."""
    return structural_similarity(a.double(), b.double())


def border_steps(images: Tensor) -> Tensor:
    """Mean absolute difference between neighboring pixels, in rows and columns alike: (B, 3) float64.

    At borders of blocks of 32 pixels; at those of 8 that are none of 32; elsewhere. NaN where there are none.
    """
    found = []
    for steps, size in (
        (images.diff(dim=-1).abs().mean((1, 2)), images.shape[-1]),
        (images.diff(dim=-2).abs().mean((1, 3)), images.shape[-2]),
    ):
        place = torch.arange(1, size)
        kind = torch.where(place % 8 != 0, 2, torch.where(place % 32 != 0, 1, 0))
        found.append((steps.double(), kind))
    steps_BX, kinds_X = (torch.cat(x, dim=-1) for x in zip(*found, strict=True))
    return torch.stack([steps_BX[:, kinds_X == kind].mean(1) for kind in range(3)], dim=1)


def codebook_usage(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and perplexity, exp(entropy) of their frequencies, its geometric mean over codebooks.

    ``counts`` is (K,), or (n, K) for several codebooks; no codebook has only zeros.
    """
    share = counts.double() / counts.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1).mean()
    return float((share > 0).double().mean()), float(entropy.exp())


def bits_per_token(config: AdaptiveTokenizerConfig) -> float:
    """Bits of a token: log2 of the number of codes; continuous tokens count 16 bits per channel."""
    if config.bottleneck == "quantized":
        return math.log2(config.codebook_size)
    return 16.0 * (config.encoder.width if config.bottleneck == "unfactorized" else config.code_dim)


def eight_bits(pixels: Tensor, *, truncated: bool = False) -> Tensor:
    """Pixels clamped to [0, 1] and rounded to 8 bits, or truncated, as published: float32."""
    levels = pixels.float().clamp(0, 1) * 255
    return (levels.floor() if truncated else levels.round()) / 255


def tokens_needed(errors_NK: Tensor, lengths: Sequence[int], limit: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) int64 of the first iteration with error below ``limit``, else all; and (N,) bool, True if one is."""
    met = errors_NK < limit
    first = torch.where(met.any(1), met.int().argmax(1), errors_NK.shape[1] - 1)
    return torch.tensor(lengths)[first], met.any(1)


def thumbnail_side(bits: float) -> int:
    """Side of the largest square RGB image of ``DEPTH`` bits per channel that fits into ``bits``; at least 1."""
    return max(1, math.isqrt(int(bits // (3 * DEPTH))))


def thumbnail_pixels(images: Tensor, bits: float) -> Tensor:
    """Pixels that a thumbnail stores: block means, rounded to ``DEPTH`` bits per channel.

    Args:
        images: (B, 3, height, width).
        bits: per image; n tokens of a codebook of K have n log2 K.

    Returns:
        (B, 3, side, side), the side that of :func:`thumbnail_side`, but none larger than the images'.
    """
    side, levels = thumbnail_side(bits), 2**DEPTH - 1
    height, width = (min(side, size) for size in images.shape[2:])
    return torch.round(adaptive_avg_pool2d(images, (height, width)) * levels) / levels


def thumbnail(images: Tensor, bits: float) -> Tensor:
    """Thumbnail (:func:`thumbnail_pixels`) enlarged (bilinear) to the images' size: (B, 3, height, width), 8 bits."""
    small, size = thumbnail_pixels(images, bits), images.shape[2:]
    return eight_bits(interpolate(small, size=size, mode="bilinear", align_corners=False))
