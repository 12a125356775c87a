"""Criteria that decide lengths after the first iteration, by what the length head predicts: for a limit or a budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .allocation import allocated
from .criteria import FixedLength
from .criterion import NEAR, Prepared, check_threshold
from .iteration import Iteration
from .length_head import KINDS, LengthHead, curve_lengths, features_of
from .model import AdaptiveModel
from .pixel_errors import contrast_of


class Planned(FixedLength):
    """Stopping criterion with given lengths for the images with these ``numbers``, ascending."""

    def __init__(self, tokens: list[int], numbers: list[int]) -> None:
        super().__init__(tokens)
        self.numbers = torch.tensor(numbers)

    def of(self, images: list[int]) -> list[int]:
        places = {number: place for place, number in enumerate(self.numbers.tolist())}
        return super().of([places[image] for image in images])

    def wanted(self, iteration: Iteration) -> Tensor:
        numbers = self.numbers.to(iteration.image_index_B)
        places = torch.searchsorted(numbers, iteration.image_index_B)
        return self.tokens.to(iteration.image_index_B)[places]


class Predicted(Prepared):
    """Stopping criterion that gives an image as many tokens as the model's length head predicts for a limit: one run of
    the encoder decides, and nothing is decoded.

    These are the fewest tokens whose predicted error, with the margin that training found, is within the limit; if none
    is, the fewest within 1 % of the least predicted error. The host waits for the device once per batch.

    Args:
        max_l1, max_code_error, max_relative_l1: exactly one, a limit like that of :class:`alit.MaxL1`,
            :class:`alit.CodeError` or :class:`alit.RelativeL1`.

    Raises:
        TypeError, ValueError: not one limit, or one that is no number or below 0; when used, a model whose weights have
            no length head, or one that was not trained.
    """

    needs_prediction = False
    any_length = True

    def __init__(
        self,
        *,
        max_l1: float | None = None,
        max_code_error: float | None = None,
        max_relative_l1: float | None = None,
    ) -> None:
        limits = {
            "max_l1": max_l1,
            "max_code_error": max_code_error,
            "max_relative_l1": max_relative_l1,
        }
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise ValueError(f"Predicted: expected one of {', '.join(limits)}, got {names}")
        ((name, self.limit),) = given.items()
        check_threshold(name, self.limit)
        self.kind = KINDS.index("code_error" if name == "max_code_error" else "l1")
        self.relative = name == "max_relative_l1"

    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        head_of(model, "Predicted")

    def planned(self, first: Iteration, model: AdaptiveModel, numbers: list[int]) -> Planned:
        head = head_of(model, "Predicted")
        curve_BP = head(features_of(first, model.base_tokenizer))[:, self.kind]
        curve_BP = curve_BP + head.margin[self.kind].float()
        if self.relative:
            curve_BP = curve_BP - contrast_of(first.images).log()[:, None]
        places_B = fewest(curve_BP, float(self.limit))
        step, longest = head.lengths[0], head.lengths[-1]
        lengths_B = ((places_B + 1) * step).clamp(max=longest)
        return Planned(_of_trained(head, lengths_B, "Predicted"), numbers)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        if iteration.index:
            raise ValueError("Predicted: expected the first iteration, which says all lengths")
        numbers = iteration.image_index_B.tolist()
        return self.planned(iteration, model, numbers)(iteration, model)


class Budget(Prepared):
    """Criterion that spends at most ``mean_tokens`` per image on average, where that lowers mean pixel error most.

    Errors are mean absolute ones. For a whole batch (``encode``): by the predictions of the model's length head, if it
    has one, else by the errors measured at all lengths. See :func:`alit.allocation.allocated`.

    Raises:
        TypeError, ValueError: no number; when used, one that is not from the shortest length to the longest, or in a
            stream, whose images are not known together.
    """

    needs_prediction = False

    def __init__(self, mean_tokens: float) -> None:
        check_threshold("mean_tokens", mean_tokens)
        self.mean_tokens = float(mean_tokens)

    def check(self, model: AdaptiveModel, images: int | None = None) -> None:
        least, most = curve_lengths(model.config)[0], model.config.max_tokens
        if not least <= self.mean_tokens <= most:
            raise ValueError(
                f"mean_tokens: expected {least} to {most}, shortest and longest length, got {self.mean_tokens:g}"
            )

    def spent(self, errors_BP: Tensor, lengths: tuple[int, ...]) -> list[int]:
        """Length of each image, given errors (B, P) at the ``lengths``."""
        return allocated(errors_BP, lengths, math.floor(self.mean_tokens * len(errors_BP) + 1e-6))

    def planned(self, first: Iteration, model: AdaptiveModel, numbers: list[int]) -> Planned:
        errors_BP = predicted_l1(first, model)
        return Planned(self.spent(errors_BP, curve_lengths(model.config)), numbers)

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        raise ValueError("Budget: expected a whole batch, by encode; it is no criterion of others")


def fewest(curve_BP: Tensor, limit: float) -> Tensor:
    """First position (B,) at which a falling curve of logarithms is within the limit, or else within 1 % of its end."""
    target = math.log(limit) if limit > 0 else -math.inf
    least_B1 = curve_BP[:, -1:]
    bound_B1 = torch.where(least_B1 <= target, target, least_B1 + math.log(NEAR))
    return (curve_BP <= bound_B1).int().argmax(1)


def predicted_l1(first: Iteration, model: AdaptiveModel) -> Tensor:
    """Mean absolute pixel errors (B, P) that the length head predicts, on the CPU.

    Raises:
        ValueError: no length head, or one that was not trained.
    """
    head = head_of(model, "Budget")
    curve_BP = head(features_of(first, model.base_tokenizer))[:, KINDS.index("l1")].exp()
    rows = torch.cat([curve_BP, head.image_count.float().expand(len(curve_BP), 1)], 1).cpu()
    _check_trained(float(rows[0, -1]), "Budget")
    return rows[:, :-1]


def head_of(model: AdaptiveModel, name: str) -> LengthHead:
    """The model's length head.

    Raises:
        ValueError: it has none; the message names the command that trains one.
    """
    if model.length_head is None:
        raise ValueError(f"{name}: these weights have no length head; {_HOW}")
    return model.length_head


_HOW = "train one: alit train --stage length --start-from MODEL --data PHOTOS --output RUN"


def _of_trained(head: LengthHead, lengths_B: Tensor, name: str) -> list[int]:
    """Lengths on the host, in one copy from the device that also tells if the head was trained; else ``ValueError``."""
    *lengths, image_count = torch.cat([lengths_B, head.image_count.long()[None]]).tolist()
    _check_trained(image_count, name)
    return lengths


def _check_trained(image_count: float, name: str) -> None:
    if image_count <= 0:
        raise ValueError(f"{name}: the length head of these weights was not trained; {_HOW}")
