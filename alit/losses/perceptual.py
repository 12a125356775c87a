"""LPIPS (Zhang et al., 2018) on VGG16, by the ``lpips`` package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Perceptual(nn.Module):
    """LPIPS distance, frozen, always in evaluation mode unless ``dropout``.

    Args:
        unit_range: images in [0, 1] go in as they are (published training) instead of as [-1, 1].
        dropout: the dropout of its heads follows the training mode (published training).
        pretrained: fetch the weights of VGG16, where they are not at hand yet; False leaves random ones, to be loaded.

    Raises:
        ValueError: the package or the weights cannot be had; the message says what to do.
    """

    def __init__(
        self, *, unit_range: bool = False, dropout: bool = False, pretrained: bool = True
    ) -> None:
        super().__init__()
        self.unit_range, self.dropout = unit_range, dropout
        self.net = _network(pretrained).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Perceptual:
        super().train(mode)
        self.net.train(mode and self.dropout)
        return self

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair: (B,). Images (B, 3, height, width) in [0, 1]."""
        return self.net(images, reconstructions, normalize=not self.unit_range).flatten()


def _network(pretrained: bool) -> Any:
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise ValueError(
            "perceptual: the package lpips is not installed: pip install 'alit[train]', or --perceptual off"
        ) from error
    try:
        return lpips.LPIPS(
            net="vgg", pretrained=pretrained, pnet_rand=not pretrained, verbose=False
        )
    except (OSError, RuntimeError) as error:  # a download that failed, or a damaged file
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"perceptual: the weights of VGG16 cannot be had ({error}); put them into {folder}, or --perceptual off"
        ) from error
