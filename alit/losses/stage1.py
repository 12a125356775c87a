"""Stage 1: latent distillation. The decoder learns to predict the base tokens after every iteration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..base import Prediction
from ..iteration import Iteration
from ..tokenizer import AdaptiveTokenizer
from .tails import check_tails, kept_lengths

#: Published weight of the main term of each iteration; later iterations have weight 1.
WEIGHTS = (2.5, 2.0, 1.5, 1.25)


class IterationLoss(NamedTuple):
    """Loss terms (scalars) of one iteration; ``nll`` (nats) is None where the base has no codebook."""

    nll: Tensor | None
    code: Tensor
    quantization: Tensor


class Stage1Loss(NamedTuple):
    """Result of :func:`stage1_loss`: ``total``, and its terms by iteration number."""

    total: Tensor
    iterations: dict[int, IterationLoss]


def stage1_loss(
    model: AdaptiveTokenizer,
    images: Tensor,
    *,
    at: Collection[int] | None = None,
    weights: Sequence[float] = WEIGHTS,
    together: bool | None = None,
    tail_drop: float = 0.0,
    **rollout_options: Any,
) -> Stage1Loss:
    """Published stage-1 loss, summed over iterations.

    With a codebook: weight * cross-entropy + mse(expected code, true code) + quantizer loss; without: weight * mse +
    quantizer loss. Means over all tokens and elements; gradients flow through all iterations.

    Args:
        images: (B, 3, height, width) in [0, 1].
        at: iterations (from 0) whose loss counts; all by default. The rollout ends with the last of them.
        weights: by iteration number; 1 beyond its end.
        together: True: where nothing halts, one run of the decoder for all iterations after the last: the same numbers
            up to rounding, from half as many kernels. False: one run in each iteration, whose activations fit the
            caches of a CPU. None: together on a GPU.
        tail_drop: probability for each image and iteration that the decoder sees only its first latents, see
            :func:`alit.losses.tails.kept_lengths`; where nothing halts.
        rollout_options: passed to :meth:`alit.AdaptiveTokenizer.rollout`.

    Raises:
        ValueError: ``at`` is empty or holds a number that is no iteration; wrong images; ``tail_drop`` is no
            probability, or tokens halt.
    """
    check_tails(model, tail_drop)
    at = range(model.config.iterations) if at is None else at
    if not at:
        raise ValueError("at: expected at least one iteration, got none")
    together = images.is_cuda if together is None else together
    later = model.config.halting == "off" and (together or tail_drop > 0)
    iterations: list[Iteration] = []
    rollout = model.rollout(
        images, predict_at=at, predict_later=later, iterations=max(at) + 1, **rollout_options
    )
    for iteration in rollout:
        if iteration.index in at:
            iterations.append(iteration)
    predictions: Sequence[Prediction | None] = [x.prediction for x in iterations]
    if later:
        target_BN = iterations[0].base.target_BN
        codes = [x.bottleneck.codes_BLC for x in iterations]
        own = model.config.latents_per_iteration
        lengths = [kept_lengths(x, own, tail_drop) for x in iterations] if tail_drop else None
        if together:
            predictions = model.predict_together(codes, target_BN, lengths)
        else:
            assert lengths is not None
            pairs = zip(codes, lengths, strict=True)
            predictions = [model.predict(x, target_BN, lengths_B) for x, lengths_B in pairs]
    terms: dict[int, IterationLoss] = {}
    total = torch.zeros((), device=images.device)
    for iteration, prediction in zip(iterations, predictions, strict=True):
        assert prediction is not None
        weight = weights[iteration.index] if iteration.index < len(weights) else 1.0
        terms[iteration.index] = term = _terms(iteration, prediction)
        if term.nll is None:
            total = total + weight * term.code + term.quantization
        else:
            total = total + weight * term.nll + term.code + term.quantization
    return Stage1Loss(total, terms)


def _terms(iteration: Iteration, prediction: Prediction) -> IterationLoss:
    quantization = iteration.bottleneck.loss
    nll = None if prediction.nll_BN is None else prediction.nll_BN.mean()
    code = mse_loss(prediction.code_BNC.float(), iteration.base.code_BNC.float())
    return IterationLoss(nll, code, code.new_zeros(()) if quantization is None else quantization)
