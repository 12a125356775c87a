"""A network that mends images: what a transform of few coefficients lost, and what their quantization added."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle, silu

#: Pixels down and across that become channels.
STEM = 4


class ImageFilter(nn.Module):
    """Images (B, 3, height, width) plus a correction, which is zero at first; sides are multiples of 8.

    A U of two levels: ``channels`` at a quarter of the resolution, twice as many at an eighth. Its last layer
    overlaps, so that no border of its blocks shows.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv_in = nn.Conv2d(3 * STEM**2, channels, 3, padding=1)
        self.before = Residual(channels)
        self.down = nn.Conv2d(channels, wide, 2, stride=2)
        self.middle = nn.Sequential(*(Residual(wide) for _ in range(blocks)))
        self.up = nn.ConvTranspose2d(wide, channels, 2, stride=2)
        self.after = nn.Sequential(Residual(channels), Residual(channels))
        self.conv_out = nn.ConvTranspose2d(channels, 3, 2 * STEM, stride=STEM, padding=STEM // 2)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        # Convolutions of a CPU are faster with channels last.
        x = pixel_unshuffle(images - 0.5, STEM).contiguous(memory_format=torch.channels_last)
        x = self.before(self.conv_in(x))
        x = self.after(x + self.up(self.middle(self.down(x))))
        return images + self.conv_out(silu(x)).to(images.dtype)


class Residual(nn.Module):
    """Two 3x3 convolutions with SiLU between them, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(silu(self.conv_1(x)))
