"""Image sizes that a model takes beside the configured one, and the positions of their tokens.

Any multiple of the base tokenizer's patch will do, up to ``MOST`` times as many image tokens as the model's own has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import AdaptiveTokenizerConfig

#: Numbers of image tokens down and across.
Grid = tuple[int, int]
#: Most image tokens of an image, over those of the configured size; bounds the encoder's rows, and so memory.
MOST = 16


class Places(NamedTuple):
    """Positional embeddings of a grid in encoder and decoder: the class token's, then H W in row-major order.

    Attributes:
        grid: (H, W).
        encoder_ND, decoder_ND: (1 + H W, width).
    """

    grid: Grid
    encoder_ND: Tensor
    decoder_ND: Tensor

    @property
    def tokens(self) -> int:
        """Number of class and image tokens."""
        return 1 + math.prod(self.grid)


def learned_place(own: Grid, grid: Grid) -> Tensor:
    """Place of the grid ``own`` whose position each place of ``grid`` takes: (H W,) int64, both counted row by row.

    The learned places, row by row, are dealt out evenly to the places of the grid; within a row they go from left to
    right. So a place takes one near the same share of height and width, and where there are no more places than were
    learned, none is taken twice: a model tells places apart by positions that it knows, and interpolated ones, as usual
    with vision transformers, are none of these. On a larger grid several neighbors take the same.
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
    """Numbers of image tokens down and across, of an image of ``height`` x ``width`` pixels."""
    patch = config.base.patch_size
    return height // patch, width // patch


def check_size(config: AdaptiveTokenizerConfig, height: int, width: int, name: str) -> None:
    """Check that a model takes images of this size; raises ``ValueError`` that names the argument."""
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


def check_image(config: AdaptiveTokenizerConfig, like: Tensor, image: Tensor, name: str) -> Grid:
    """Check an image (3, height, width) in [0, 1] of any size that the model takes, and return its grid.

    Args:
        like: a parameter of the model, for device and dtype.
        name: of the argument, for messages.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape or (on the CPU) range.
    """
    _check_kind(like, image, name)
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{name}: expected shape (3, height, width), got {tuple(image.shape)}")
    height, width = image.shape[1:]
    check_size(config, height, width, name)
    _check_values(image, name)
    return grid_of(config, height, width)


def check_images(config: AdaptiveTokenizerConfig, like: Tensor, images: Tensor, grid: Grid) -> None:
    """Check that these are a batch (B, 3, height, width) of images of a grid; raises as :func:`check_image`."""
    height, width = (side * config.base.patch_size for side in grid)
    _check_kind(like, images, "images")
    if images.ndim != 4 or images.shape[1:] != (3, height, width):
        other = "; a list of images may be of any sizes" if images.ndim == 4 else ""
        raise ValueError(
            f"images: expected shape (B, 3, {height}, {width}), got {tuple(images.shape)}{other}"
        )
    if images.shape[0] == 0:
        raise ValueError("images: expected at least one, got none")
    _check_values(images, "images")


def _check_kind(like: Tensor, images: Tensor, name: str) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{name}: expected a floating-point tensor in [0, 1], got {got}; divide 8-bit images by 255"
        )
    if images.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} like the model, got {images.device}"
        )
    if images.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"{name}: expected dtype {like.dtype} like the model, got {images.dtype}")


def _check_values(images: Tensor, name: str) -> None:
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: expected values in [0, 1], got {float(low):.4g} to {float(high):.4g}"
            )
