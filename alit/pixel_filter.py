"""A small network over decoded pixels: it takes away what a base tokenizer leaves, ringing and blur."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, pixel_shuffle, pixel_unshuffle

#: Side of the blocks whose pixels are channels: convolutions at half the resolution reach twice as far.
BLOCK = 2
#: What enters the convolutions, and what they add: pixels differ from mid-grey by much less than 1, and corrections by
#: less than they do.
INPUT, OUTPUT = 4.0, 0.1


class PixelFilter(nn.Module):
    """Three convolutions on blocks of 2 x 2 pixels, whose result is added. At first it adds nothing.

    Args:
        channels: between the convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        pixels = 3 * BLOCK**2
        self.first = nn.Conv2d(pixels, channels, 3, padding=1)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, pixels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), even sides, about [0, 1]: the same."""
        x = pixel_unshuffle((images - 0.5) * INPUT, BLOCK)
        x = self.middle(gelu(self.first(x)))
        return images + OUTPUT * pixel_shuffle(self.last(gelu(x)), BLOCK)
