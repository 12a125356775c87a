"""A small network that says after the first iteration how the error will fall with the number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, softplus

from .base.dct import YCBCR
from .config import AdaptiveTokenizerConfig
from .iteration import Iteration
from .pixel_errors import LEAST_CONTRAST, contrast_of

#: What is predicted, in this order: errors as MaxL1, CodeError and RelativeL1 have them.
KINDS = ("l1", "code_error", "relative_l1")
HIDDEN = 128
#: Scales at which neighbouring pixels are compared: each pixel, means of 2 x 2, of 4 x 4.
SCALES = (1, 2, 4)
#: Sides of the blocks whose means, enlarged again, the picture is compared with.
BLOCKS = (2, 4, 8, 16, 32)
#: Beyond so many standard deviations a feature counts as that many: no picture is far from those that were learned.
FARTHEST = 6.0


def curve_lengths(config: AdaptiveTokenizerConfig) -> tuple[int, ...]:
    """Numbers of tokens at which errors are predicted: every fourth, the last included, where the decoder knows any
    length; else those of whole iterations.
    """
    step = 4 if config.any_length else config.latents_per_iteration
    return (*range(step, config.max_tokens, step), config.max_tokens)


class LengthHead(nn.Module):
    """Features of the first iteration -> two layers -> for each kind of error a curve that falls with the length.

    A curve is its first value and decrements above 0, of logarithms of errors; that of relative errors is shifted by
    the contrast, which is known. ``alit train --stage length`` fits it.

    Attributes:
        lengths: numbers of tokens at which the curves have values (P of them).
        mean, std: of the features, as training found them.
        margin: (kinds,), added to a curve before it is compared with a limit.
        pictures: how many it was fitted to; 0 before.
    """

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        super().__init__()
        self.lengths = curve_lengths(config)
        count = 3 * config.encoder.width + config.base.latent_channels
        count += 6 * len(SCALES) + 6 * len(BLOCKS) + 1
        if config.recurrence == "residual" and config.iterations > 1:
            count += config.base.latent_channels + 1
        self.hidden = nn.Linear(count, HIDDEN)
        self.out = nn.Linear(HIDDEN, len(KINDS) * len(self.lengths))
        self.mean: Tensor
        self.std: Tensor
        self.margin: Tensor
        self.pictures: Tensor
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))
        self.register_buffer("margin", torch.zeros(len(KINDS)))
        self.register_buffer("pictures", torch.zeros(()))

    def forward(self, features_BF: Tensor) -> Tensor:
        """Logarithms of errors (B, kinds, P), without margin."""
        normal_BF = (features_BF.to(self.mean) - self.mean) / self.std
        hidden = nn.functional.gelu(self.hidden(normal_BF.clamp(-FARTHEST, FARTHEST)))
        values = self.out(hidden).float().unflatten(1, (len(KINDS), -1))
        curves = torch.cat([values[..., :1], -softplus(values[..., 1:])], -1).cumsum(-1)
        return curves + shift_of(features_BF)


def shift_of(features_BF: Tensor) -> Tensor:
    """Of the curves (B, kinds, 1): of a relative error the logarithm of 1 / contrast, the last feature; of others 0."""
    shift_B = -features_BF[:, -1].float().clamp(min=math.log(LEAST_CONTRAST))
    return torch.stack([shift_B if kind == "relative_l1" else 0 * shift_B for kind in KINDS], 1)[
        ..., None
    ]


def features_of(first: Iteration) -> Tensor:
    """(B, F) float32 of the first iteration: what the encoder found, and how busy the picture is.

    The class token, the means of image tokens and of latents; logarithms of the mean absolute value of each channel of
    the base tokens; for luma and both chroma planes, logarithms of the mean absolute differences of pixels to the right
    and below at three scales, of the mean and root mean square error of five thumbnails; where the
    decoder has made a code of the tokens already, of its error in each channel and in all; of the contrast.
    """
    images = first.images.float()
    red, green, blue = images.unbind(1)  # by numbers of the host: nothing waits for the device
    planes = torch.stack([r * red + g * green + b * blue for r, g, b in YCBCR], 1)
    sizes = [first.base.tokens_BCHW.float().abs().mean((2, 3))]
    for scale in SCALES:
        coarse = _means(planes, scale)
        for dim in (2, 3):
            steps = coarse.diff(dim=dim).abs().flatten(2)
            sizes.append(steps.sum(2) / max(1, steps.shape[2]))
    for side in BLOCKS:
        size = planes.shape[2:]
        errors = (planes - interpolate(_means(planes, side), size, mode="bilinear")).flatten(2)
        sizes += [errors.abs().mean(2), errors.square().mean(2).sqrt()]
    if first.decoded is not None:
        missing = (first.decoded.code_BNC - first.base.code_BNC).float().abs().mean(1)
        sizes += [missing, missing.mean(1, keepdim=True)]
    tokens_BND = first.image_tokens_BND.float()
    found = [tokens_BND[:, 0], tokens_BND[:, 1:].mean(1), first.latents_BLD.float().mean(1)]
    return torch.cat(
        [*found, (torch.cat([*sizes, contrast_of(images)[:, None]], 1) + 1e-4).log()], 1
    )


def _means(planes: Tensor, side: int) -> Tensor:
    """Of about square blocks of this side, of which there are whole numbers."""
    if side == 1:
        return planes
    height, width = planes.shape[2:]
    return adaptive_avg_pool2d(planes, (-(-height // side), -(-width // side)))
