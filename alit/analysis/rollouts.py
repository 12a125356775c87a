"""Reconstructions of images after each iteration, and their errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..console import reported
from ..pixel_errors import l1_of
from ..tokenizer import AdaptiveTokenizer
from .inputs import batches

#: Called with images and reconstructions after each iteration: (B, 3, height, width) each, on the CPU.
Watch = Callable[[Tensor, list[Tensor]], None]


@torch.no_grad()
def errors(
    model: AdaptiveTokenizer,
    levels: Tensor,
    *,
    batch_size: int = 8,
    watch: Watch | None = None,
    doing: str = "measuring errors",
) -> Tensor:
    """Mean absolute pixel error (L1) of each image after each iteration, as :class:`alit.MaxL1` measures it.

    Args:
        levels: (N, 3, height, width) uint8.
        doing: name of the work for :func:`alit.console.report`.

    Returns:
        (N, iterations) float32, on the CPU.
    """
    found: list[Tensor] = []
    parts = batches(levels, batch_size)
    for images in reported(parts, doing, len(levels), size=len):
        shown = reconstructions(model, images)
        found.append(torch.stack([l1_of(pixels, images) for pixels in shown], dim=1))
        if watch is not None:
            watch(images, shown)
    return torch.cat(found)


@torch.no_grad()
def reconstructions(model: AdaptiveTokenizer, images: Tensor) -> list[Tensor]:
    """Reconstructions after each iteration, (B, 3, height, width) each, about [0, 1], not clamped; on the CPU."""
    shown = []
    for iteration in model.rollout(images.to(model.latent_tokens.device)):
        assert iteration.prediction is not None
        shown.append(model.pixels(iteration.prediction).cpu())
    return shown
