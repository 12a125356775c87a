"""The baseline that a tokenizer has to beat: a small picture of as many bits, enlarged."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate


def thumbnail_side(bits: float, depth: int = 4) -> int:
    """Side of the largest square RGB picture with ``depth`` bits per channel that fits into ``bits``; at least 1."""
    return max(1, math.isqrt(int(bits // (3 * depth))))


def thumbnail(images: Tensor, bits: float, *, depth: int = 4) -> Tensor:
    """Block means, rounded to ``depth`` bits per channel, enlarged (bilinear) to the size of the images; never larger.

    Args:
        images: (B, 3, height, width) in [0, 1].
        bits: per picture; n tokens of a codebook of K have n log2 K.
    """
    side, levels = thumbnail_side(bits, depth), 2**depth - 1
    height, width = (min(side, size) for size in images.shape[2:])
    small = torch.round(adaptive_avg_pool2d(images, (height, width)) * levels) / levels
    return interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)
