"""Error curves over the number of tokens: measured at every length that a curve has, or predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import BaseTokens
from .iteration import Bottleneck, Iteration
from .length_head import KINDS, curve_lengths, features_of, of_patches
from .model import AdaptiveModel
from .pixel_errors import absolute_error
from .prediction import predicted_l1
from .rollout import Rollout, rollouts_of


class Curves(NamedTuple):
    """Error curves of some images, and the features and latents of their rollout.

    Attributes:
        features_BNF: features of the first iteration, for the length head.
        patches_BKPN: errors of each kind (``KINDS``) at each of the lengths that were measured, in the patch of each
            image token.
        bottlenecks: the latents read out after each iteration.
    """

    features_BNF: Tensor
    patches_BKPN: Tensor
    bottlenecks: list[Bottleneck]

    @property
    def errors_BKP(self) -> Tensor:
        """Errors of the whole images, (B, kinds, P): means over patches."""
        return self.patches_BKPN.mean(-1)


@torch.no_grad()
def measured(
    model: AdaptiveModel,
    images: Tensor | Rollout,
    *,
    lengths: Sequence[int] | None = None,
    base: BaseTokens | None = None,
    generator: torch.Generator | None = None,
) -> Curves:
    """Measure error curves: run all iterations, and decode the first tokens of each at the ``lengths`` that it adds.

    ``lengths``: all ``curve_lengths`` by default. ``images``: a batch, or a rollout of it that has not begun.
    """
    lengths = curve_lengths(model.config) if lengths is None else lengths
    features: list[Tensor] = []
    errors: list[Tensor] = []
    bottlenecks: list[Bottleneck] = []
    rollout = images
    if isinstance(rollout, Tensor):
        rollout = Rollout(model, rollout, base=base, predict_at=(), generator=generator)
    for iteration in rollout:
        if not features:
            features.append(features_of(iteration, model.base_tokenizer))
        own = range(
            iteration.num_tokens - model.config.latents_per_iteration + 1, iteration.num_tokens + 1
        )
        errors += [_errors(iteration, model, length) for length in lengths if length in own]
        bottlenecks.append(iteration.bottleneck)
    return Curves(features[0], torch.stack(errors, 2), bottlenecks)


def _errors(iteration: Iteration, model: AdaptiveModel, length: int) -> Tensor:
    """Errors of each patch, decoded from the first ``length`` tokens, (B, kinds, N)."""
    base = iteration.base
    codes_BLC = iteration.bottleneck.codes_BLC[:, :length]
    prediction = model.predict(codes_BLC, base.target_BN, places=iteration.places)
    grid = base.tokens_BCHW.shape[2], base.tokens_BCHW.shape[3]
    found = {
        "l1": of_patches(absolute_error(model.pixels(prediction), iteration.images), grid),
        "code_error": (prediction.code_BNC - base.code_BNC).float().abs().mean(2),
    }
    return torch.stack([found[kind] for kind in KINDS], 1)


@torch.no_grad()
def l1_curves(model: AdaptiveModel, images: Sequence[Tensor]) -> Tensor:
    """Mean absolute pixel errors (B, P) at ``curve_lengths``, on the CPU: by the length head, or measured.

    Args:
        images: (3, height, width) each, of any sizes, as in the lists that :func:`alit.encoding.encode` takes.
    """
    curves: dict[int, Tensor] = {}
    for rollout, numbers in rollouts_of(model, images, predict_at=()):
        if model.length_head is None:
            errors_BP = measured(model, rollout).errors_BKP[:, KINDS.index("l1")].cpu()
        else:
            errors_BP = predicted_l1(next(rollout), model)
        curves |= zip(numbers, errors_BP, strict=True)
    return torch.stack([curves[number] for number in range(len(images))])
