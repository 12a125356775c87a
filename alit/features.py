"""Tokens as features for downstream tasks.

Shape suffixes: B images, L tokens, D width, C code channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_number
from .config import AdaptiveTokenizerConfig
from .encoding import check_given
from .iteration import Iteration
from .model import AdaptiveModel
from .rollout import Rollout, encode_together, rollouts_of


class Features(NamedTuple):
    """Features of images at one length: their tokens before and after quantization.

    All floating-point tensors have the dtype that the model computes in.

    Attributes:
        tokens_BLD: latents behind the encoder's last normalization, of the encoder's width.
        codes_BLC: what the decoder gets of them: quantized; in a "continuous" model of ``code_dim`` channels, in an
            "unfactorized" one ``tokens_BLD``.
        index_BL: int64, of the codes; None where there is no quantizer.
    """

    tokens_BLD: Tensor
    codes_BLC: Tensor
    index_BL: Tensor | None

    @property
    def pooled_BD(self) -> Tensor:
        """Mean latent of each image, (B, D)."""
        return self.tokens_BLD.mean(1)

    @property
    def pooled_codes_BC(self) -> Tensor:
        """Mean code of each image, (B, C)."""
        return self.codes_BLC.mean(1)


def check_tokens(config: AdaptiveTokenizerConfig, tokens: int, name: str = "tokens") -> None:
    """Check that a model was made for this number of tokens; raises ``ValueError`` that names the argument."""
    check_number(name, tokens, int, 1, config.max_tokens)
    step = config.latents_per_iteration
    if tokens % step and not config.any_length:
        raise ValueError(
            f"{name}: expected a multiple of {step}, whole iterations, from a model that was not made for any_length, "
            f"got {tokens}"
        )


def features(model: AdaptiveModel, images: Tensor | Sequence[Tensor], *, tokens: int) -> Features:
    """Features of images at one length, the same that ``encode`` with ``FixedLength(tokens)`` quantizes.

    Gradients are recorded unless the caller turns them off (``torch.no_grad``): those of ``tokens_BLD`` reach the
    encoder and the images, those of ``codes_BLC`` too, straight through the quantizer. They flow back through all
    iterations; with ``recurrence="residual"`` they end where an iteration begins, so that each trains the encoder, and
    only the tokens of the first reach the images. A model in training mode also does what it does in training: it keeps
    the quantizer's statistics and samples what is random.

    Args:
        images: as for :meth:`alit.AdaptiveTokenizer.encode`: a batch, or a list of images of any sizes.
        tokens: from 1 to ``max_tokens``; whole iterations unless the model's configuration says ``any_length``.

    Raises:
        ValueError: another number of tokens.
        TypeError, ValueError: images, as :meth:`alit.AdaptiveTokenizer.encode`.
    """
    return features_at(model, images, [tokens])[0]


def features_at(
    model: AdaptiveModel, images: Tensor | Sequence[Tensor], lengths: Sequence[int]
) -> list[Features]:
    """Features of images at several lengths, from one rollout, see :func:`features`."""
    for tokens in lengths:
        check_tokens(model.config, tokens)
    check_given(images)
    # In the residual recurrence iterations outside ``predict_at`` record no gradients.
    residual = model.config.recurrence == "residual"
    options: dict[str, Any] = {"predict_at": None if residual else (), "predict_later": residual}
    options["iterations"] = math.ceil(max(lengths) / model.config.latents_per_iteration)
    if isinstance(images, Tensor):
        started = [(Rollout(model, images, **options), list(range(len(images))))]
    else:
        started = rollouts_of(model, images, **options)
    rollouts = [rollout for rollout, _ in started]
    steps: list[list[Iteration]] = [[] for _ in rollouts]
    for _ in range(options["iterations"]):
        encoded = encode_together(rollouts)
        for rollout, rows_BSD, seen in zip(rollouts, encoded, steps, strict=True):
            seen.append(rollout.advance(rows_BSD))
    order = torch.tensor([number for _, numbers in started for number in numbers]).argsort()
    return [_together([_first(model, x, n) for x in steps], order) for n in lengths]


def _first(model: AdaptiveModel, steps: Sequence[Iteration], tokens: int) -> Features:
    """Features of the first ``tokens``: of the iteration that completes them, or, if tokens are final, all up to it."""
    last = math.ceil(tokens / model.config.latents_per_iteration)
    own = steps[0 if model.config.recurrence == "residual" else last - 1 : last]
    latents = [model.encoder_ln_post(x.latents_BLD) for x in own]
    # A bottleneck holds the codes of earlier iterations too, but without their gradients.
    codes = [x.bottleneck.codes_BLC[:, -x.latents_BLD.shape[1] :] for x in own]
    tokens_BLD, codes_BLC = (torch.cat(x, 1)[:, :tokens] for x in (latents, codes))
    index_BL = own[-1].bottleneck.index_BL
    return Features(tokens_BLD, codes_BLC, None if index_BL is None else index_BL[:, :tokens])


def _together(parts: Sequence[Features], order: Tensor) -> Features:
    """Concatenate the features of images of several sizes, in the order in which the images were given."""
    if len(parts) == 1:
        return parts[0]
    order = order.to(parts[0].tokens_BLD.device)
    whole: list[Any] = [
        None if x[0] is None else torch.cat(x)[order] for x in zip(*parts, strict=True)
    ]
    return Features(*whole)
