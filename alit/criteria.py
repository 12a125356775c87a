"""Token selection: when is a picture described well enough?

A criterion is called after each iteration with the :class:`alit.Iteration` and the model and says for each
image that is still being encoded whether it is done. ``needs_prediction`` tells whether the decoder has to run for it.
Those that measure an error say how large it is; ``selection.py`` has the rules. ``any_length``: a criterion looks at
nothing but predictions and ``tokens_B``, and may be asked about the first few tokens of an iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .iteration import Iteration
from .model import AdaptiveModel
from .pixel_errors import l1_of, relative_l1_of, structural_similarity

#: Tokens of an image that is not done.
NEVER = 2**31
#: An error within this factor of the least one counts as equal to it.
NEAR = 1.01
#: Limits are divided by at least this much where criteria are compared.
SMALLEST_LIMIT = 1e-12


class Criterion(Protocol):
    needs_prediction: bool

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """(B,) bool over the images of ``iteration``: done?"""


class Verdict(NamedTuple):
    """What is found of the images of an iteration.

    Attributes:
        tokens_B: (B,) int64, with how many of the iteration's tokens each is done; ``NEVER`` where it is not.
        error_B: (B,) floating point, below or about 1 where the limit is met; None where nothing is measured.
    """

    tokens_B: Tensor
    error_B: Tensor | None


def judged(criterion: Criterion, iteration: Iteration, model: AdaptiveModel) -> Verdict:
    """What a criterion finds, by its method ``judged``; one without is asked whether the images are done.

    Raises:
        TypeError, ValueError: it gives no tensor, or one of another shape or dtype than (B,) bool.
    """
    if (own := getattr(criterion, "judged", None)) is not None:
        return own(iteration, model)
    done = criterion(iteration, model)
    expected = (
        f"criterion: expected {type(criterion).__name__} to give ({iteration.batch_size},) bool"
    )
    if not isinstance(done, Tensor):
        raise TypeError(f"{expected}, got {type(done).__name__}")
    if done.shape != (iteration.batch_size,) or done.dtype != torch.bool:
        raise ValueError(f"{expected}, got {tuple(done.shape)} {done.dtype}")
    return Verdict(torch.where(done, iteration.tokens_B, NEVER), None)


def check_criterion(criterion: object) -> bool:
    """That it is one; whether it needs predictions.

    Raises:
        TypeError: it is none.
    """
    needed = getattr(criterion, "needs_prediction", None)
    if not callable(criterion) or not isinstance(needed, bool):
        raise TypeError(
            "criterion: expected FixedLength, RelativeL1, MaxL1, another of alit's, or any "
            "callable with a bool attribute needs_prediction, got "
            f"{type(criterion).__name__}"
        )
    return needed


def check_threshold(name: str, value: object) -> None:
    """That it is a number of at least 0.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not float(value) >= 0:  # NaN neither
        raise ValueError(f"{name}: expected at least 0, got {value}")


class Prepared(ABC):
    """Base class of criteria that are held against the model first, and look at the first iteration once."""

    needs_prediction: bool
    #: How many images it is for; None for any number.
    images: int | None = None

    @abstractmethod
    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """As :class:`Criterion`."""

    @abstractmethod
    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        """Raise ``ValueError`` if it does not fit the model or the number of images (None: unknown)."""

    def planned(self, first: Iteration, model: AdaptiveModel, number: int) -> Criterion:
        """What it comes to for the images of a first iteration, which are numbered from ``number``."""
        return self


class FixedLength(Prepared):
    """A given number of tokens, for all images or for each; of a model with iterations of 32, the first 40 tokens that
    the second iteration gives.

    Args:
        tokens: one number, or one per image, from 1 to the model's ``max_tokens``.

    Raises:
        ValueError: no integers; when used, others than these, or a number of them that is not that of the images.
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
        """The lengths of these images, on the host."""
        tokens: Any = self.tokens.tolist()
        return [tokens[x] if self.tokens.ndim else tokens for x in images]

    def wanted(self, iteration: Iteration) -> Tensor:
        """(B,) int64"""
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
    """An error that a criterion measures, and its limit.

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
        """Of each image, (B,) floating point."""

    @abstractmethod
    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        """(B,) bool: done; (B,) error over its limit."""

    def judged(self, iteration: Iteration, model: AdaptiveModel) -> Verdict:
        done_B, error_B = self.measured(iteration, model)
        return Verdict(torch.where(done_B, iteration.tokens_B, NEVER), error_B)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return self.measured(iteration, model)[0]


class ErrorCriterion(Measured):
    """An image is done when its ``error`` is below ``threshold``; base class of criteria that measure one.

    ``Quirks.batch_mean_criterion`` and ``Quirks.best_iteration_fallback`` apply to these alone.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        error_B = self.error(iteration, model)
        return error_B < self.threshold, error_B.double() / max(self.threshold, SMALLEST_LIMIT)


class Score(Measured):
    """An image is done when its ``score``, at most 1, is at least ``threshold``; the error is what it lacks of 1."""

    @abstractmethod
    def score(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """Of each image, (B,) floating point."""

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return 1 - self.score(iteration, model)

    def measured(self, iteration: Iteration, model: AdaptiveModel) -> tuple[Tensor, Tensor]:
        score_B = self.score(iteration, model)
        limit = max(1 - self.threshold, SMALLEST_LIMIT)
        return score_B >= self.threshold, (1 - score_B.double()) / limit


class MaxL1(ErrorCriterion):
    """Mean absolute pixel error of the image below ``threshold`` (pixels in [0, 1]); decodes pixels every iteration.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return l1_of(model.pixels(iteration.prediction), iteration.images)


class RelativeL1(ErrorCriterion):
    """Mean absolute pixel error below ``threshold`` times the image's own contrast; decodes pixels every iteration.

    The contrast is the mean absolute deviation of the pixels from their mean, channel by channel: the error of a
    picture of one color. A picture with less than 0.03 (7.6 of 255) counts as one of 0.03, so that a flat one has a
    limit above 0. Predicted pixels are clamped to [0, 1], as they are shown.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return relative_l1_of(model.pixels(iteration.prediction), iteration.images)


class MinSSIM(Score):
    """Structural similarity with the image at least ``threshold``; decodes pixels every iteration.

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
    """Mean absolute difference between predicted and true base code below ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return (iteration.prediction.code_BNC - iteration.base.code_BNC).float().abs().mean((1, 2))


class TokenAccuracy(Score):
    """Share of base tokens whose most likely code is the true one at least ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0; when called with a model whose base tokenizer
            has no codebook.
    """

    def score(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """(B,) float32."""
        assert iteration.prediction is not None
        target_BN = iteration.base.target_BN
        if target_BN is None:
            raise ValueError(
                f"TokenAccuracy: expected a base tokenizer with a codebook, the model's is {model.config.base.kind!r}"
            )
        return (iteration.prediction.decoded_BNV.argmax(-1) == target_BN).float().mean(1)
