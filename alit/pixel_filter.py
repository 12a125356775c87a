"""Small network over decoded pixels that removes what a base tokenizer leaves, ringing and blur."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, pixel_shuffle, pixel_unshuffle

#: Side of the blocks whose pixels are channels: convolutions at half the resolution reach twice as far.
BLOCK = 2
#: Scales of the convolutions' input and output: pixels differ from mid-gray by much less than 1, and corrections are
#: smaller than that.
INPUT, OUTPUT = 4.0, 0.1


class PixelFilter(nn.Module):
    """Filter that adds to an image the output of three convolutions on blocks of 2 x 2 pixels; at first zero.

    An image of one color never changes: the first convolution sees only differences between neighbors, images are
    padded with their edges, and there are no biases.

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
        """Filtered images (B, 3, height, width), about [0, 1]; sides are even."""
        x = pixel_unshuffle((images - 0.5) * INPUT, BLOCK)
        by_color = self.first.weight.unflatten(1, (3, -1))
        differences = (by_color - by_color.mean((2, 3, 4), keepdim=True)).flatten(1, 2)
        x = gelu(conv2d(_wider(x), differences))
        x = gelu(self.middle(_wider(x)))
        return images + OUTPUT * pixel_shuffle(self.last(_wider(x)), BLOCK)


def _wider(x: Tensor) -> Tensor:
    """``x`` padded by one on all sides with the values at its edges."""
    # Made of parts: torch 2.13's inductor does not compile replicating pads of a batch whose size is not known.
    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)
    return torch.cat([x[..., :1], x, x[..., -1:]], -1)
