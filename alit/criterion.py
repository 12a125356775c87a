"""Protocol of stopping criteria, which say when an image is described well enough.

A criterion is called after each iteration with the :class:`alit.Iteration` and the model and says for each
image that is still being encoded whether it is done. ``needs_prediction`` tells whether the decoder has to run for it.
Criteria that measure an error also return it; ``selection.py`` has the rules. ``any_length``: a criterion looks at
nothing but predictions and ``tokens_B``, and may be asked about the first few tokens of an iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .iteration import Iteration
from .model import AdaptiveModel

#: Number of tokens that stands for an image that is not done.
NEVER = 2**31
#: An error within this factor of the least one counts as equal to it.
NEAR = 1.01


class Criterion(Protocol):
    needs_prediction: bool

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """True for the images of ``iteration`` that are done, (B,) bool."""


class Verdict(NamedTuple):
    """Result of a criterion for the images of an iteration.

    Attributes:
        tokens_B: (B,) int64, number of the iteration's tokens with which an image is done; ``NEVER`` if it is not.
        error_B: (B,) floating point, error, below or about 1 where the limit is met; None if nothing is measured.
    """

    tokens_B: Tensor
    error_B: Tensor | None


def judged(criterion: Criterion, iteration: Iteration, model: AdaptiveModel) -> Verdict:
    """Verdict of a criterion, by its method ``judged``; without one, by calling it, and without errors.

    Raises:
        TypeError, ValueError: as :func:`answer`.
    """
    if (own := getattr(criterion, "judged", None)) is not None:
        return own(iteration, model)
    done_B = answer(criterion, iteration, criterion(iteration, model))
    return Verdict(torch.where(done_B, iteration.tokens_B, NEVER), None)


def answer(criterion: object, iteration: Iteration, done_B: Tensor) -> Tensor:
    """Answer of a criterion, ``done_B``, after a check that it is (B,) bool.

    Raises:
        TypeError, ValueError: no tensor, or one of another shape or dtype than (B,) bool.
    """
    name = type(criterion).__name__
    expected = f"criterion: expected {name} to give ({iteration.batch_size},) bool"
    if not isinstance(done_B, Tensor):
        raise TypeError(f"{expected}, got {type(done_B).__name__}")
    if done_B.shape != (iteration.batch_size,) or done_B.dtype != torch.bool:
        raise ValueError(f"{expected}, got {tuple(done_B.shape)} {done_B.dtype}")
    return done_B


def check_criterion(criterion: object) -> bool:
    """True if the criterion needs predictions; raises ``TypeError`` for anything that is no criterion."""
    needed = getattr(criterion, "needs_prediction", None)
    if not callable(criterion) or not isinstance(needed, bool):
        raise TypeError(
            "criterion: expected FixedLength, RelativeL1, another of alit's, or any callable "
            f"with a bool attribute needs_prediction, got {type(criterion).__name__}"
        )
    return needed


def check_threshold(name: str, value: object) -> None:
    """Check that ``value`` is a number of at least 0; raises ``TypeError`` or ``ValueError``, which name it."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not float(value) >= 0:  # NaN neither
        raise ValueError(f"{name}: expected at least 0, got {value}")


class Prepared(ABC):
    """Base class of criteria that are checked against the model first, and may plan after the first iteration."""

    needs_prediction: bool
    #: Number of images that the criterion is for; None for any.
    images: int | None = None

    @abstractmethod
    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        """True for the images of ``iteration`` that are done, (B,) bool."""

    @abstractmethod
    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        """Raise ``ValueError`` if the criterion does not fit the model or the number of images (None: unknown)."""

    def planned(self, first: Iteration, model: AdaptiveModel, numbers: list[int]) -> Criterion:
        """Criterion to use for the images of a first iteration, given their numbers, ascending; by default this one."""
        return self
