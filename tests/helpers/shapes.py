"""Images of shapes on plain backgrounds, and a judge that recognizes the shape in an image."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 64
#: Width of a soft edge in pixels.
SOFT = 4.0
KINDS = ("circle", "square", "triangle")
#: RGB in [0, 1].
BACKGROUNDS = np.array([[0.92, 0.92, 0.88], [0.12, 0.14, 0.2]])
COLORS = np.array([[0.85, 0.2, 0.15], [0.15, 0.6, 0.25], [0.95, 0.75, 0.1]])
#: Half the side of a square of the same area, in pixels; centers of mass lie on a grid.
SIZES, GRID = (10.0, 13.0, 16.0), 4


class Shapes(NamedTuple):
    """Images (N, 3, 64, 64) in [0, 1], and the index in ``KINDS`` of each."""

    images: Tensor
    kinds: list[int]


def covered(kind: int, x: float, y: float, size: float) -> np.ndarray:
    """Share of each pixel, (64, 64), that a shape with center of mass (x, y) and area ``(2 size)^2`` covers."""
    at = np.arange(SIDE) + 0.5
    dx, dy = at[None] - x, at[:, None] - y
    if kind == 0:
        within = 2 * size / np.pi**0.5 - np.hypot(dx, dy)
    elif kind == 1:
        within = size - np.maximum(abs(dx), abs(dy))
    else:  # upright and equilateral: the distance from the nearest of three lines
        radius = 2 * size / 27**0.25
        within = radius - np.maximum(dy, 3**0.5 / 2 * abs(dx) - dy / 2)
    return (within / SOFT + 0.5).clip(0, 1)


def shapes(count: int, seed: int = 0) -> Shapes:
    random = np.random.default_rng(seed)
    images, kinds = [], []
    for _ in range(count):
        kind, size = int(random.integers(3)), random.choice(SIZES)
        margin = math.ceil(1.6 * size / GRID)
        x, y = GRID * random.integers(margin, SIDE // GRID - margin + 1, 2)
        share = covered(kind, x, y, size)[..., None]
        color, background = random.choice(COLORS), random.choice(BACKGROUNDS)
        images.append(share * color + (1 - share) * background)
        kinds.append(kind)
    pixels = torch.from_numpy(np.stack(images)).float()
    return Shapes(pixels.permute(0, 3, 1, 2).contiguous(), kinds)


#: Largest difference of an image from the shape recognized in it, as a share of the shape's difference from the
#: background; and largest difference of a color from that of a palette.
WORST, WORST_COLOR = 0.4, 0.12


def judged(image: Tensor) -> int | None:
    """Index in ``KINDS`` of the shape in an image (3, 64, 64); None if it is no shape in known colors.

    Background and color are medians of the frame and of the pixels that differ most from it; place and size are
    computed from the mass between them. One of the kinds, drawn with these, must be near the image.
    """
    pixels = image.permute(1, 2, 0).double().clamp(0, 1).numpy()
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(frame, 0), BACKGROUNDS)
    if background is None:
        return None
    far = abs(pixels - background).sum(-1)
    color = _nearest(np.median(pixels[far > 0.7 * np.quantile(far, 0.98)], 0), COLORS)
    if color is None:
        return None
    line = color - background
    share = ((pixels - background) @ line / (line @ line)).clip(0, 1)
    share[share < 0.25] = 0
    size = share.sum() ** 0.5 / 2
    if not 0.9 * SIZES[0] < size < 1.1 * SIZES[-1]:
        return None
    at = np.arange(SIDE) + 0.5
    x, y = (share.sum(0) @ at) / share.sum(), (share.sum(1) @ at) / share.sum()
    errors = [error(pixels, kind, x, y, size, color, background) for kind in range(3)]
    best = int(np.argmin(errors))
    return best if errors[best] < WORST else None


def error(
    pixels: np.ndarray,
    kind: int,
    x: float,
    y: float,
    size: float,
    color: np.ndarray,
    background: np.ndarray,
) -> float:
    share = covered(kind, x, y, size)[..., None]
    wrong = abs(share * color + (1 - share) * background - pixels).sum()
    return float(wrong / (share.sum() * abs(color - background).sum()))


def _nearest(found: np.ndarray, palette: np.ndarray) -> np.ndarray | None:
    distances = abs(palette - found).max(1)
    return palette[distances.argmin()] if distances.min() < WORST_COLOR else None
