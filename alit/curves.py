"""How errors fall with the number of tokens: measured at every length that a curve has, or predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .base import BaseTokens
from .criteria import CodeError
from .iteration import Bottleneck, Iteration
from .length_head import KINDS, curve_lengths, features_of
from .model import AdaptiveModel
from .pixel_errors import l1_of, relative_l1_of
from .prediction import predicted_l1
from .rollout import Rollout


class Curves(NamedTuple):
    """Of some images.

    Attributes:
        features_BF: of the first iteration, for the length head.
        errors_BKP: of each kind (``KINDS``) at each of the lengths that were measured.
        bottlenecks: the latents read out after each iteration.
    """

    features_BF: Tensor
    errors_BKP: Tensor
    bottlenecks: list[Bottleneck]


@torch.no_grad()
def measured(
    model: AdaptiveModel,
    images: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    base: BaseTokens | None = None,
    generator: torch.Generator | None = None,
) -> Curves:
    """Run all iterations and decode the first tokens of each, at these ``lengths`` above the iteration before.

    All ``curve_lengths`` where none are given.
    """
    lengths = curve_lengths(model.config) if lengths is None else lengths
    features: list[Tensor] = []
    errors: list[Tensor] = []
    bottlenecks: list[Bottleneck] = []
    for iteration in Rollout(model, images, base=base, predict_at=(), generator=generator):
        if not features:
            features.append(features_of(iteration))
        own = range(
            iteration.num_tokens - model.config.latents_per_iteration + 1, iteration.num_tokens + 1
        )
        errors += [_errors(iteration, model, length) for length in lengths if length in own]
        bottlenecks.append(iteration.bottleneck)
    return Curves(features[0], torch.stack(errors, -1), bottlenecks)


def _errors(iteration: Iteration, model: AdaptiveModel, length: int) -> Tensor:
    """(B, kinds) of the first tokens."""
    codes_BLC = iteration.bottleneck.codes_BLC[:, :length]
    prediction = model.predict(codes_BLC, iteration.base.target_BN)
    pixels, images = model.pixels(prediction), iteration.images
    found = {
        "l1": l1_of(pixels, images),
        "code_error": CodeError(0.0).error(replace(iteration, prediction=prediction), model),
        "relative_l1": relative_l1_of(pixels, images),
    }
    return torch.stack([found[kind].float() for kind in KINDS], 1)


@torch.no_grad()
def l1_curves(model: AdaptiveModel, images: Tensor) -> Tensor:
    """Mean absolute pixel errors (B, P) at ``curve_lengths``, on the CPU: predicted by the model, or measured."""
    if model.length_head is None:
        return measured(model, images).errors_BKP[:, KINDS.index("l1")].cpu()
    return predicted_l1(next(Rollout(model, images, predict_at=())), model.length_head)
