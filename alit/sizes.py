"""Images of other sizes than the configured one: which there are, and the positions of their tokens.

Any multiple of the base tokenizer's patch will do, up to ``MOST`` times as many image tokens as the model's own has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

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


def learned_place(own: Grid, grid: Grid) -> Tensor:
    """Whose position each place of a grid takes, of the places of the grid ``own``: (H W,) int64, both row by row.

    The learned places, row by row, are dealt out evenly to the places of the grid; within a row they go from left to
    right. So a place takes one near the same share of height and width, and where there are no more places than were
    learned, none is taken twice: a model tells places apart by positions that it knows. (Interpolated ones, as usual
    with vision transformers, are none of these: with the shipped weights and 256 tokens the error of photographs of 4:3
    is half as large again.) Of a larger grid several neighbors take the same.
    """
    learned = torch.arange(math.prod(own)).view(own)
    places = math.prod(grid)
    if places > learned.numel():
        for axis in (0, 1):
            learned = learned.repeat_interleave(max(1, round(grid[axis] / own[axis])), dim=axis)
    dealt = (torch.arange(places) * learned.numel() // places).view(grid)
    from_left = (dealt % learned.shape[1]).argsort(dim=1, stable=True)
    return learned.flatten()[dealt.gather(1, from_left).flatten()]


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
