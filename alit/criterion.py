"""What a criterion is: it says when an image is described well enough.

A criterion is called after each iteration with the :class:`alit.Iteration` and the model and says for each
image that is still being encoded whether it is done. ``needs_prediction`` tells whether the decoder has to run for it.
Those that measure an error say how large it is; ``selection.py`` has the rules. ``any_length``: a criterion looks at
nothing but predictions and ``tokens_B``, and may be asked about the first few tokens of an iteration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .iteration import Iteration
from .model import AdaptiveModel

#: Tokens of an image that is not done.
NEVER = 2**31
#: An error within this factor of the least one counts as equal to it.
NEAR = 1.01


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
        TypeError, ValueError: as :func:`answer`.
    """
    if (own := getattr(criterion, "judged", None)) is not None:
        return own(iteration, model)
    done_B = answer(criterion, iteration, criterion(iteration, model))
    return Verdict(torch.where(done_B, iteration.tokens_B, NEVER), None)


def answer(criterion: object, iteration: Iteration, done_B: Tensor) -> Tensor:
    """What a criterion says, checked.

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
    """That it is one; whether it needs predictions.

    Raises:
        TypeError: it is none.
    """
    needed = getattr(criterion, "needs_prediction", None)
    if not callable(criterion) or not isinstance(needed, bool):
        raise TypeError(
            "criterion: expected FixedLength, RelativeL1, another of alit's, or any callable "
            f"with a bool attribute needs_prediction, got {type(criterion).__name__}"
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

    def planned(self, first: Iteration, model: AdaptiveModel, numbers: list[int]) -> Criterion:
        """What it comes to for the images of a first iteration, which have these numbers, ascending."""
        return self
