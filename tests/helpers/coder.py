"""A small model that can start as a transform coder, and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from alit import DCTConfig
from alit.config import TransformerConfig

SHAPE = TransformerConfig(width=96, layers=3, heads=4)
#: 8 x 8 image tokens, one latent for each two of them; the transformer has more heads than the transform coder uses.
OPTIONS: dict[str, Any] = {
    "base": DCTConfig(patch_size=8, luma=12, chroma=3),
    "image_size": 64,
    "latents_per_iteration": 32,
    "iterations": 4,
    "recurrence": "residual",
    "codebooks": "each",
    "metric": "euclidean",
    "code_dim": 8,
    "codebook_size": 512,
    "encoder": SHAPE,
    "decoder": SHAPE,
}
GRID = 8


def smooth_images(count: int, seed: int = 3) -> Tensor:
    """Smooth random images: noise at three scales, (B, 3, 64, 64)."""
    draw = torch.Generator().manual_seed(seed)
    noise = [torch.rand(count, 3, side, side, generator=draw) for side in (3, 10, 32)]
    smooth = [interpolate(x, size=(64, 64), mode="bicubic") for x in noise]
    return (0.5 * smooth[0] + 0.35 * smooth[1] + 0.15 * smooth[2]).clamp(0, 1)
