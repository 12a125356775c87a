"""Stopping criteria for adaptive encoding; ``criterion.py`` defines their protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .criterion import NEVER, Prepared, Verdict, answer, check_threshold
from .iteration import Iteration
from .model import AdaptiveModel
from .pixel_errors import contrast_of, l1_of, structural_similarity

#: Errors are divided by at least this much, instead of a smaller limit, where criteria are compared.
SMALLEST_LIMIT = 1e-12


class FixedLength(Prepared):
    """Stopping criterion that gives all images, or each, a fixed number of tokens; 40 with iterations of 32 tokens are
    the first 40 that the second iteration gives.

    Args:
        tokens: one number, or one per image, from 1 to the model's ``max_tokens``.

    Raises:
        ValueError: no integers; when used, a number out of range, or not one per image.
    """

    needs_prediction = False
    any_length = True

    def __init__(self, tokens: int | Sequence[int] | Tensor) -> None:
        self.tokens = torch.as_tensor(tokens)
        if self.tokens.ndim > 1 or self.tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens: expected an integer or one per image, got {tokens!r}")

        self.images = self.tokens.shape[0] if self.tokens.ndim else None

    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        longest = model.config.max_tokens
        if None not in (images, self.images) and self.images != images:
            raise ValueError(f"tokens: expected one length per image ({images}), got {self.images}")
        bad = [n for n in self.tokens.flatten().tolist() if not 1 <= n <= longest]
        if bad:
            raise ValueError(f"tokens: expected 1 to {longest}, got {bad[0]}")

    def of(self, images: list[int]) -> list[int]:
        """Lengths of the images with these numbers, on the host."""
        tokens: Any = self.tokens.tolist()
        return [tokens[x] if self.tokens.ndim else tokens for x in images]

    def wanted(self, iteration: Iteration) -> Tensor:
        """Lengths of the iteration's images, (B,) int64."""
        tokens = self.tokens.to(iteration.image_index_B)
        return (
            tokens[iteration.image_index_B] if tokens.ndim else tokens.expand(iteration.batch_size)
        )

    def judged(self, iteration: Iteration, model: AdaptiveModel) -> Verdict:
        wanted_B = self.wanted(iteration)
        done_B = iteration.tokens_B >= wanted_B
        return Verdict(torch.where(done_B, wanted_B, NEVER), torch.where(done_B, 0.0, torch.inf))

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return iteration.tokens_B >= self.wanted(iteration)


@dataclass(frozen=True)
class Measured(ABC):
    """Base class of stopping criteria that measure an error and compare it with a limit.

    Raises:
        TypeError, ValueError: a threshold that is no number, or out of range.
    """

    threshold: float
    needs_prediction = True
    any_length = True

    def __post_init__(self) -> None:
        check_threshold("threshold", self.threshold)

    @abstractmethod
    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """Error of each image, (B,) floating point."""

    @abstractmethod
    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        """True for images that are done, (B,) bool; each image's error divided by its limit, (B,) floating point."""

    @property
    def limit(self) -> float:
        """Limit of the error."""
        return self.threshold

    @classmethod
    def within(cls, limit: float) -> Measured:
        """Criterion with this limit of the error."""
        return cls(limit)

    def judged(self, iteration: Iteration, model: AdaptiveModel) -> Verdict:
        done_B, error_B = self.measured(iteration, model)
        done_B = answer(self, iteration, done_B)
        return Verdict(torch.where(done_B, iteration.tokens_B, NEVER), error_B)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return self.measured(iteration, model)[0]


class ErrorCriterion(Measured):
    """Base class of stopping criteria that are met when an image's ``error`` is below ``threshold``.

    ``Quirks.batch_mean_criterion`` and ``Quirks.best_iteration_fallback`` apply to these alone.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        error_B = self.error(iteration, model)
        return error_B < self.threshold, error_B.double() / max(self.threshold, SMALLEST_LIMIT)


class Score(Measured):
    """Base class of stopping criteria met when ``score``, at most 1, is at least ``threshold``; error: 1 - score."""

    @abstractmethod
    def score(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """Score of each image, at most 1, (B,) floating point."""

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return 1 - self.score(iteration, model)

    @property
    def limit(self) -> float:
        return 1 - self.threshold

    @classmethod
    def within(cls, limit: float) -> Measured:
        return cls(max(0.0, 1 - limit))  # errors above 1 are negative scores

    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        score_B = self.score(iteration, model)
        return score_B >= self.threshold, (1 - score_B.double()) / max(self.limit, SMALLEST_LIMIT)


class MaxL1(ErrorCriterion):
    """Stopping criterion: mean absolute error of pixels in [0, 1] below ``threshold``; decodes pixels every iteration.

    Predicted pixels are clamped to [0, 1], as they are shown, but for ``Quirks.unclamped_pixel_error``.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        pixels = model.pixels(iteration.prediction)
        if model.config.quirks.unclamped_pixel_error:
            return (pixels - iteration.images).float().abs().mean((1, 2, 3))
        return l1_of(pixels, iteration.images)


class RelativeL1(ErrorCriterion):
    """Stopping criterion: mean absolute pixel error below ``threshold`` times the image's own contrast.

    Decodes pixels every iteration. The contrast is the mean absolute deviation of the pixels from their mean, channel
    by channel: the error of an image of one color. A contrast below 0.03 (7.6 of 255) counts as 0.03, so that a flat
    image has a limit above 0. Predicted pixels are clamped to [0, 1], as they are shown.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        error_B = l1_of(model.pixels(iteration.prediction), iteration.images)
        return error_B / contrast_of(iteration.images)


class MinSSIM(Score):
    """Stopping criterion: structural similarity with the image at least ``threshold``; decodes pixels every iteration.

    Predicted pixels are clamped to [0, 1], as they are shown. See :func:`alit.pixel_errors.structural_similarity`.

    Raises:
        TypeError, ValueError: a threshold that is no number, or not in [0, 1]; when called with images of less than 7
            pixels across or down.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold > 1:
            raise ValueError(f"threshold: expected at most 1, got {self.threshold}")

    def score(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        pixels = model.pixels(iteration.prediction).float().clamp(0, 1)
        return structural_similarity(iteration.images, pixels)


class CodeError(ErrorCriterion):
    """Stopping criterion: mean absolute error of the predicted base code below ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return (iteration.prediction.code_BNC - iteration.base.code_BNC).float().abs().mean((1, 2))


class TokenAccuracy(Score):
    """Stopping criterion: share of rightly predicted base tokens at least ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0; when called with a model whose base tokenizer
            has no codebook.
    """

    def score(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """Share of base tokens whose most likely code is the true one, (B,) float32."""
        assert iteration.prediction is not None
        target_BN = iteration.base.target_BN
        if target_BN is None:
            raise ValueError(
                f"TokenAccuracy: expected a base tokenizer with a codebook, the model's is {model.config.base.kind!r}"
            )
        return (iteration.prediction.decoded_BNV.argmax(-1) == target_BN).float().mean(1)
