"""Pixel errors between images: absolute, relative to their contrast, in structure (SSIM, Wang et al., 2004)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

#: Least contrast that an image counts with, a flat one too (see :class:`alit.RelativeL1`).
LEAST_CONTRAST = 0.03


def absolute_error(pixels: Tensor, images: Tensor) -> Tensor:
    """Absolute error of each pixel, float32; predicted ``pixels`` are clamped to [0, 1], as they are shown."""
    return (pixels.float().clamp(0, 1) - images.float()).abs()


def l1_of(pixels: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of each pair of images, (B,) float32, see :func:`absolute_error`."""
    return absolute_error(pixels, images).mean((1, 2, 3))


def contrast_of(images: Tensor) -> Tensor:
    """Contrast (B,): mean absolute deviation of pixels from their channel's mean, at least ``LEAST_CONTRAST``."""
    images = images.float()
    deviation = (images - images.mean((2, 3), keepdim=True)).abs()
    return deviation.mean((1, 2, 3)).clamp(min=LEAST_CONTRAST)


def structural_similarity(x: Tensor, y: Tensor, *, window: int = 7) -> Tensor:
    """SSIM of each pair of images (B, 3, height, width) in [0, 1], 1 for equal ones: (B,) float32, or float64.

    As scikit-image computes it by default: uniform window, sample covariance, mean over channels and the windows
    that lie within the image.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(x.shape[-2:]) < window:
        size = "x".join(map(str, x.shape[-2:]))
        raise ValueError(f"images: expected at least {window}x{window} pixels for SSIM, got {size}")
    if x.dtype != torch.float64:
        x, y = x.float(), y.float()
    mean_x, mean_y = avg_pool2d(x, window, 1), avg_pool2d(y, window, 1)
    sample = window**2 / (window**2 - 1)
    variance_x = sample * (avg_pool2d(x * x, window, 1) - mean_x * mean_x)
    variance_y = sample * (avg_pool2d(y * y, window, 1) - mean_y * mean_y)
    covariance = sample * (avg_pool2d(x * y, window, 1) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))
