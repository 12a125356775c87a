"""A small network over decoded pixels: it takes away what a base tokenizer leaves, ringing and blur."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, pixel_shuffle, pixel_unshuffle

#: Side of the blocks whose pixels are channels: convolutions at half the resolution reach twice as far.
BLOCK = 2
#: What enters the convolutions, and what they add: pixels differ from mid-gray by much less than 1, and corrections by
#: less than they do.
INPUT, OUTPUT = 4.0, 0.1


class PixelFilter(nn.Module):
    """Three convolutions on blocks of 2 x 2 pixels, whose result is added. At first it adds nothing.

    To one color it never adds anything: the first convolution sees only differences between neighbors, images go on at
    their edges, and there are no biases.

    Args:
        channels: between the convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        pixels = 3 * BLOCK**2
        self.first = nn.Conv2d(pixels, channels, 3, bias=False)
        self.middle = nn.Conv2d(channels, channels, 3, bias=False)
        self.last = nn.Conv2d(channels, pixels, 3, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), even sides, about [0, 1]: the same."""
        x = pixel_unshuffle((images - 0.5) * INPUT, BLOCK)
        by_color = self.first.weight.unflatten(1, (3, -1))
        differences = (by_color - by_color.mean((2, 3, 4), keepdim=True)).flatten(1, 2)
        x = gelu(conv2d(_wider(x), differences))
        x = gelu(self.middle(_wider(x)))
        return images + OUTPUT * pixel_shuffle(self.last(_wider(x)), BLOCK)


def _wider(x: Tensor) -> Tensor:
    """By one on all sides, where it is as at its edge."""
    # Of parts: torch 2.13's inductor does not compile replicating pads of a batch whose size is not known.
    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)
    return torch.cat([x[..., :1], x, x[..., -1:]], -1)
