"""Token selection: when is a picture described well enough?

A criterion is called after each iteration with the :class:`alit.Iteration` and the model and says for each
image that is still being encoded whether it is done. ``needs_prediction`` tells whether the decoder has to run for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .iteration import Iteration
from .model import AdaptiveModel


class Criterion(Protocol):
    needs_prediction: bool

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """(B,) bool over the images of ``iteration``: done?"""


class FixedLength:
    """A given number of tokens, for all images or for each.

    Args:
        tokens: one number, or one per image; multiples of the model's ``latents_per_iteration``, within its maximum.
    """

    needs_prediction = False

    def __init__(self, tokens: int | Sequence[int] | Tensor) -> None:
        self.tokens = torch.as_tensor(tokens)
        if self.tokens.ndim > 1 or self.tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens: expected an integer or one per image, got {tokens!r}")

    def check(self, model: AdaptiveModel, images: int) -> None:
        """Raise ``ValueError`` if these lengths do not fit the model or the number of images."""
        step, longest = model.config.latents_per_iteration, model.config.max_tokens
        if self.tokens.ndim == 1 and self.tokens.shape[0] != images:
            raise ValueError(
                f"tokens: expected one length per image ({images}), got {self.tokens.shape[0]}"
            )
        bad = [n for n in self.tokens.flatten().tolist() if n % step or not step <= n <= longest]
        if bad:
            raise ValueError(
                f"tokens: expected multiples of {step} from {step} to {longest}, got {bad[0]}"
            )

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        wanted = self.tokens.to(iteration.image_index_B.device)
        wanted = wanted[iteration.image_index_B] if wanted.ndim else wanted
        return (iteration.num_tokens >= wanted).expand(iteration.batch_size)


@dataclass(frozen=True)
class _Threshold:
    """A number that a criterion compares with.

    Raises:
        TypeError, ValueError: one that is no number, or below 0.
    """

    threshold: float
    needs_prediction = True

    def __post_init__(self) -> None:
        if isinstance(self.threshold, (bool, str)) or not hasattr(self.threshold, "__float__"):
            raise TypeError(f"threshold: expected a number, got {type(self.threshold).__name__}")
        if not float(self.threshold) >= 0:  # NaN neither
            raise ValueError(f"threshold: expected at least 0, got {self.threshold}")


class ErrorCriterion(_Threshold, ABC):
    """An image is done when its ``error`` is below ``threshold``; base class of criteria that measure one.

    ``Quirks.batch_mean_criterion`` and ``Quirks.best_iteration_fallback`` apply to these alone.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    @abstractmethod
    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """Of each image, (B,) floating point."""

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return self.error(iteration, model) < self.threshold


class MaxL1(ErrorCriterion):
    """Mean absolute pixel error of the image below ``threshold`` (pixels in [0, 1]); decodes pixels every iteration.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return (model.pixels(iteration.prediction) - iteration.images).float().abs().mean((1, 2, 3))


class CodeError(ErrorCriterion):
    """Mean absolute difference between predicted and true base code below ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0.
    """

    def error(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        assert iteration.prediction is not None
        return (iteration.prediction.code_BNC - iteration.base.code_BNC).float().abs().mean((1, 2))


class TokenAccuracy(_Threshold):
    """Share of base tokens whose most likely code is the true one at least ``threshold``; decodes no pixels.

    Raises:
        TypeError, ValueError: a threshold that is no number, or below 0; when called with a model whose base tokenizer
            has no codebook.
    """

    def accuracy(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """(B,) float32."""
        assert iteration.prediction is not None
        target_BN = iteration.base.target_BN
        if target_BN is None:
            raise ValueError(
                f"TokenAccuracy: expected a base tokenizer with a codebook, the model's is {model.config.base.kind!r}"
            )
        return (iteration.prediction.decoded_BNV.argmax(-1) == target_BN).float().mean(1)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return self.accuracy(iteration, model) >= self.threshold
