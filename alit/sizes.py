"""Images of other sizes than the configured one: which there are, and the positions of their tokens.

Any multiple of the base tokenizer's patch will do, up to ``MOST`` times as many image tokens as the model's own has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .config import AdaptiveTokenizerConfig

#: Image tokens down and across.
Grid = tuple[int, int]
#: Image tokens of an image at most, over those of the configured size: it bounds the encoder's rows, and so memory.
MOST = 16


class Places(NamedTuple):
    """What encoder and decoder add to the tokens of a grid's places: the class token's, then H W in row-major order.

    Attributes:
        grid: (H, W).
        encoder_ND, decoder_ND: (1 + H W, width).
    """

    grid: Grid
    encoder_ND: Tensor
    decoder_ND: Tensor

    @property
    def tokens(self) -> int:
        """Class and image tokens."""
        return 1 + math.prod(self.grid)


def resized(positions_ND: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Positions that were learned on the grid ``own``, on another one: bicubic, the class token's as it is.

    The picture fills both grids: a place has the position of the point of the learned grid that lies at the same share
    of height and width, as usual with vision transformers.
    """
    if grid == own:
        return positions_ND
    planes = positions_ND[1:].T.unflatten(1, own).float()
    planes = interpolate(planes[None], size=grid, mode="bicubic", align_corners=False)[0]
    return torch.cat([positions_ND[:1], planes.flatten(1).T.to(positions_ND.dtype)])


def grid_of(config: AdaptiveTokenizerConfig, height: int, width: int) -> Grid:
    """Image tokens down and across of an image of that many pixels."""
    patch = config.base.patch_size
    return height // patch, width // patch


def check_size(config: AdaptiveTokenizerConfig, height: int, width: int, name: str) -> None:
    """Raise ``ValueError`` where images cannot have this size, in the name of an argument."""
    patch, got = config.base.patch_size, f"got {height} x {width}"
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(
            f"{name}: expected sides of at least {patch} pixels, the base's patch, and multiples of it, {got}"
        )
    most = MOST * math.prod(config.grid)
    if (tokens := math.prod(grid_of(config, height, width))) > most:
        raise ValueError(
            f"{name}: expected at most {most} patches of {patch} x {patch} pixels, {MOST} times as many as in the "
            f"model's own size, {got} with {tokens}"
        )
