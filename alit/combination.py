"""Stopping criteria that combine several."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .criterion import NEVER, Criterion, Prepared, Verdict, check_criterion, judged
from .iteration import Iteration
from .model import AdaptiveModel
from .prediction import Budget


class Combined(Prepared, ABC):
    """Base class of stopping criteria that combine several."""

    def __init__(self, *criteria: Criterion) -> None:
        if not criteria:
            raise ValueError(f"criteria: expected at least one in {type(self).__name__}, got none")
        self.criteria = criteria
        needed = [check_criterion(each) for each in criteria]
        self.needs_prediction = any(needed)
        for each in criteria:
            if isinstance(each, Budget):
                raise ValueError("criteria: expected Budget alone, got it among others")
        counts = [x.images for x in criteria if isinstance(x, Prepared)]
        self.images = min((n for n in counts if n is not None), default=None)
        self.any_length = all(getattr(each, "any_length", False) for each in criteria)

    @staticmethod
    @abstractmethod
    def combined(values: Tensor) -> Tensor:
        """Combine the token counts, or errors, of all criteria, (K, B), into (B,)."""

    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        for criterion in self.criteria:
            if isinstance(criterion, Prepared):
                criterion.check(model, images)

    def planned(self, first: Iteration, model: AdaptiveModel, numbers: list[int]) -> Combined:
        return type(self)(
            *(
                x.planned(first, model, numbers) if isinstance(x, Prepared) else x
                for x in self.criteria
            )
        )

    def judged(self, iteration: Iteration, model: AdaptiveModel) -> Verdict:
        """Combined verdict; its errors are fractions of their limits, None if one of the criteria measures none."""
        tokens, errors = zip(
            *(judged(each, iteration, model) for each in self.criteria), strict=True
        )
        measured = [error.double() for error in errors if error is not None]
        whole = self.combined(torch.stack(measured)) if len(measured) == len(errors) else None
        return Verdict(self.combined(torch.stack(tokens)), whole)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        return self.judged(iteration, model).tokens_B < NEVER


class AnyOf(Combined):
    """Stopping criterion met when any of several is: ``AnyOf(MaxL1(0.05), FixedLength(128))`` takes 128 tokens at most.

    Raises:
        TypeError, ValueError: no criteria, or something that is none.
    """

    @staticmethod
    def combined(values: Tensor) -> Tensor:
        return values.amin(0)


class AllOf(Combined):
    """Stopping criterion met when all of several are, at the same length: ``AllOf(MaxL1(0.05), MinSSIM(0.5))``.

    Raises:
        TypeError, ValueError: no criteria, or something that is none.
    """

    @staticmethod
    def combined(values: Tensor) -> Tensor:
        return values.amax(0)
