"""Small network that predicts, after the first iteration, how the error falls with the number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, pad

from .base.dct import YCBCR, DCTBase
from .base.interface import BaseTokenizer, to_grid, to_rows
from .config import AdaptiveTokenizerConfig
from .iteration import Iteration
from .pixel_errors import absolute_error, contrast_of
from .sizes import Grid

#: Kinds of errors that are predicted, in this order: as MaxL1 and CodeError measure them.
KINDS = ("l1", "code_error")
HIDDEN = 256
#: Features are clamped to this many standard deviations, so that none is far from those seen in training.
FARTHEST = 6.0
#: Added to a feature before its logarithm.
LEAST = 1e-3


def curve_lengths(config: AdaptiveTokenizerConfig) -> tuple[int, ...]:
    """Numbers of tokens at which errors are predicted: every fourth, the last included, if the decoder knows any
    length; else those of whole iterations.
    """
    step = 4 if config.any_length else config.latents_per_iteration
    return (*range(step, config.max_tokens, step), config.max_tokens)


class LengthHead(nn.Module):
    """Network from features of an image token, by two layers, to the errors of its patch, of each kind at each length.

    An image's error is the mean of its patches'; logarithms are predicted. ``alit train --stage length`` fits the
    layers to the errors of patches.

    Attributes:
        lengths: numbers of tokens at which the curves have values (P of them).
        mean, std: of the features, from training.
        margin: (kinds,), added to a curve before it is compared with a limit.
        image_count: number of images that the head was fitted to; 0 before.
    """

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        super().__init__()
        self.lengths = curve_lengths(config)
        count = 2 * config.base.latent_channels + 3
        if decodes_at_once(config):
            count += 2 * config.base.latent_channels
        if config.base.kind == "dct":
            count += 1 + decodes_at_once(config)
        self.hidden = nn.Linear(count, HIDDEN)
        self.out = nn.Linear(HIDDEN, len(KINDS) * len(self.lengths))
        self.mean: Tensor
        self.std: Tensor
        self.margin: Tensor
        self.image_count: Tensor
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))
        self.register_buffer("margin", torch.zeros(len(KINDS)))
        self.register_buffer("image_count", torch.zeros(()))

    def forward(self, features_BNF: Tensor) -> Tensor:
        """Logarithms of images' errors (B, kinds, P), which do not rise with length, without margin."""
        errors_BNKP = self.of_patches(features_BNF)
        curves = errors_BNKP.logsumexp(1) - math.log(errors_BNKP.shape[1])
        return curves.cummin(-1).values

    def of_patches(self, features_BNF: Tensor) -> Tensor:
        """Logarithms of patches' errors (B, N, kinds, P)."""
        normal = ((features_BNF.to(self.mean) - self.mean) / self.std).clamp(-FARTHEST, FARTHEST)
        return self.out(gelu(self.hidden(normal))).float().unflatten(2, (len(KINDS), -1))


def decodes_at_once(config: AdaptiveTokenizerConfig) -> bool:
    """True if the tokens of the first iteration are decoded before the second."""
    return config.recurrence == "residual" and config.iterations > 1


def features_of(first: Iteration, base_tokenizer: BaseTokenizer) -> Tensor:
    """Features of each of the N image tokens, from the first iteration: (B, N, F) float32, all logarithms.

    They are: the magnitude of each channel of the base token, and its mean over the token and its neighbors; if the
    decoder has predicted a code already, the same of what that misses; the mean absolute differences of luma to the
    right and below in the patch; with a DCT base, whose pixels are cheap, the patch's errors in the pixels of the base
    tokens, and of the predicted code, if any; the image's contrast.
    """
    images, base = first.images.float(), first.base
    grid = base.tokens_BCHW.shape[2], base.tokens_BCHW.shape[3]
    codes = [base.code_BNC]
    sizes = [_magnitudes(base.tokens_BCHW)]
    if first.decoded is not None:
        codes.append(first.decoded.code_BNC)
        sizes.append(_magnitudes(to_grid(codes[1] - codes[0], grid)))
    red, green, blue = images.unbind(1)  # with Python numbers: nothing waits for the device
    luma = (red * YCBCR[0][0] + green * YCBCR[0][1] + blue * YCBCR[0][2])[:, None]
    maps = [pad(luma.diff(dim=2), (0, 0, 0, 1)), pad(luma.diff(dim=3), (0, 1))]
    if isinstance(base_tokenizer, DCTBase):
        maps += [absolute_error(base_tokenizer.pixels(code, grid), images) for code in codes]
    sizes += [of_patches(x.abs(), grid)[..., None] for x in maps]
    sizes.append(contrast_of(images)[:, None, None].expand(-1, sizes[0].shape[1], 1))
    return (torch.cat(sizes, 2) + LEAST).log()


def of_patches(x_BCHW: Tensor, grid: Grid) -> Tensor:
    """Means (B, N) over the channels and pixels of each patch."""
    height, width = grid
    patches = x_BCHW.float().unflatten(3, (width, -1)).unflatten(2, (height, -1))
    return patches.mean((1, 3, 5)).flatten(1)


def _magnitudes(x_BCHW: Tensor) -> Tensor:
    """Magnitudes (B, N, 2 C) of each token's channels, and their means over the token and its neighbors."""
    own = x_BCHW.float().abs()
    around = avg_pool2d(pad(own, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return to_rows(torch.cat([own, around], 1))
