"""Selection of the tokens of an image that are kept: the rules between a criterion and a rollout.

1. An image is done after the first iteration whose tokens meet the criterion. Where the decoder was trained on parts
   of an iteration's tokens (``config.any_length``), the fewest of them that still meet it are kept, above the count of
   the iteration before: found by bisection, with one run of the decoder for all images of the batch in each step.
2. Where the last iteration does not meet it either, no tokens are kept that do not help: those of the first iteration
   whose error is within 1 % of the least error of all, and of them (``any_length``) the fewest within that 1 %.
   Under ``Quirks.best_iteration_fallback`` an :class:`alit.ErrorCriterion` takes the iteration with the least error; a
   criterion that measures nothing, all tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .criteria import ErrorCriterion, FixedLength
from .criterion import NEAR, Criterion, Prepared, Verdict, check_criterion, judged
from .iteration import Bottleneck, Iteration
from .model import AdaptiveModel
from .rollout import Rollout
from .sequence import TokenSequence


class Seen(NamedTuple):
    """An image after an iteration: its error, and its latents read out, row ``row`` of ``bottleneck``."""

    error: float
    bottleneck: Bottleneck
    row: int


class Unmet(NamedTuple):
    """An image not done at the end: its row in the last iteration, the iteration kept, the largest error allowed."""

    image: int
    row: int
    seen: Seen
    limit: float


@dataclass(eq=False)
class Running:
    """A rollout whose images leave it as they are done.

    Attributes:
        images: numbers of its images, on the host, in the order of its rows.
        given: lengths of its images, if they are known: nothing waits for the device then.
        seen: all iterations so far of each image that is not done, if errors are measured.
    """

    rollout: Rollout
    images: list[int]
    criterion: Criterion
    given: list[int] | None = None
    seen: dict[int, list[Seen]] = field(default_factory=lambda: defaultdict(list))

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone."""
        if len(rows) < len(self.images):
            self.rollout.keep(_index(rows, self.rollout.tokens_BSD.device))
            self.images = [self.images[row] for row in rows]
            if self.given is not None:
                self.given = [self.given[row] for row in rows]


class Selection:
    """Selection of tokens: asks the criterion about each iteration and keeps the tokens of the images that are done.

    Attributes:
        predict_at: iterations whose prediction the criterion needs: all (None), or none.
        finished: tokens of the images that are done, by image number.
        unmet: how many images no number of tokens made meet the criterion.

    Raises:
        TypeError: no criterion, or one that gives no tensor.
        ValueError: a criterion that gives another shape or dtype than (B,) bool.
    """

    def __init__(self, model: AdaptiveModel, criterion: Criterion) -> None:
        self.predict_at = None if check_criterion(criterion) else ()
        self.model, self.criterion = model, criterion
        self.finished: dict[int, TokenSequence] = {}
        self.unmet = 0
        fallback = model.config.quirks.best_iteration_fallback
        self.published = fallback and isinstance(criterion, ErrorCriterion)

    def start(self, rollout: Rollout, images: Sequence[int]) -> Running:
        """Begin selection for a rollout of the images with these numbers, its ``image_index_B``."""
        running = Running(rollout, list(images), self.criterion)
        if isinstance(self.criterion, FixedLength):
            self._settle_lengths(running, self.criterion)
        return running

    def _settle_lengths(self, running: Running, criterion: FixedLength) -> None:
        """Take the images' lengths from the criterion; the rollout ends with the iteration that the longest needs."""
        running.given = criterion.of(running.images)
        running.rollout.iterations = math.ceil(
            max(running.given) / self.model.config.latents_per_iteration
        )

    def take(self, running: Running, encoded_BSD: Tensor) -> bool:
        """Advance a rollout by an iteration, and let images that are done leave; True if any are left."""
        iteration = running.rollout.advance(encoded_BSD)
        if iteration.index == 0 and isinstance(running.criterion, Prepared):
            images = running.images
            running.criterion = running.criterion.planned(iteration, self.model, images)
            if isinstance(running.criterion, FixedLength):
                self._settle_lengths(running, running.criterion)
        last = iteration.index == self.model.config.iterations - 1
        kept = self._kept(running, iteration)
        left = []
        for row, (image, count) in enumerate(zip(running.images, kept, strict=True)):
            if count:
                self.finished[image] = tokens_of(self.model, iteration.bottleneck, row, count)
                running.seen.pop(image, None)
            else:
                left.append(row)
        if left and last:
            self._settle(running, iteration, left)
            return False
        if left:
            running.keep(left)
        return bool(left)

    def _kept(self, running: Running, iteration: Iteration) -> list[int]:
        """Number of tokens that each image keeps; 0 if it continues."""
        if running.given is not None:
            return [n if n <= iteration.num_tokens else 0 for n in running.given]
        found = judged(running.criterion, iteration, self.model)
        rows, errors = _on_host(found, iteration.num_tokens)
        for row, (image, error) in enumerate(zip(running.images, errors, strict=False)):
            running.seen[image].append(Seen(error, iteration.bottleneck, row))
        done = [row for row, count in enumerate(rows) if count]
        if done and self._at_any_length(running.criterion):
            chosen = _index(done, found.tokens_B.device)
            fewest = self._fewest(
                iteration.select(chosen),
                found.tokens_B[chosen],
                lambda part: running.criterion(part, self.model),
            )
            for row, count in zip(done, fewest.tolist(), strict=True):
                rows[row] = count
        return rows

    def _at_any_length(self, criterion: Criterion) -> bool:
        """True if model and criterion take parts of an iteration: the criterion looks at no more than parts have."""
        return self.model.config.any_length and getattr(criterion, "any_length", False)

    def _fewest(
        self, iteration: Iteration, enough_B: Tensor, met: Callable[[Iteration], Tensor]
    ) -> Tensor:
        """Fewest of the iteration's own tokens that are ``met``, (B,) int64, at most ``enough_B``, which are met."""
        step = self.model.config.latents_per_iteration
        low_B, high_B = torch.full_like(enough_B, iteration.num_tokens - step), enough_B
        for _ in range((step - 1).bit_length()):
            middle_B = (low_B + high_B + 1) // 2  # where they are neighbors, the upper one
            good_B = met(self._part(iteration, middle_B))
            low_B, high_B = (
                torch.where(good_B, low_B, middle_B),
                torch.where(good_B, middle_B, high_B),
            )
        return high_B

    def _part(self, iteration: Iteration, lengths_B: Tensor) -> Iteration:
        """Iteration with the first tokens of each image alone, and their prediction if the criterion needs one."""
        prediction = None
        if self.predict_at is None:
            codes_BLC, target_BN = iteration.bottleneck.codes_BLC, iteration.base.target_BN
            prediction = self.model.predict(codes_BLC, target_BN, lengths_B, iteration.places)
        return replace(iteration, prediction=prediction, lengths_B=lengths_B)

    def _settle(self, running: Running, last: Iteration, rows: list[int]) -> None:
        """Choose the tokens of the images that are not done after the last iteration."""
        self.unmet += len(rows)
        groups: dict[int, list[Unmet]] = defaultdict(list)
        for row in rows:
            image = running.images[row]
            if image not in running.seen:
                everything = tokens_of(self.model, last.bottleneck, row, last.num_tokens)
                self.finished[image] = everything
                continue
            seen = running.seen.pop(image)
            limit = min(x.error for x in seen) * (1.0 if self.published else NEAR)
            index = next((i for i, x in enumerate(seen) if x.error <= limit), last.index)
            groups[index].append(Unmet(image, row, seen[index], limit))
        for index, unmet in groups.items():
            counts = self._near(running.criterion, last, index, unmet)
            for (image, _, (_, bottleneck, row), _), count in zip(unmet, counts, strict=True):
                self.finished[image] = tokens_of(self.model, bottleneck, row, count)

    def _near(
        self, criterion: Criterion, last: Iteration, index: int, unmet: list[Unmet]
    ) -> list[int]:
        """Number of tokens of iteration ``index`` that each of these images keeps."""
        count = (index + 1) * self.model.config.latents_per_iteration
        if self.published or not self._at_any_length(criterion):
            return [count] * len(unmet)
        device = last.image_index_B.device
        limit_B = torch.tensor([x.limit for x in unmet], dtype=torch.float64, device=device)
        parts = [x.seen.bottleneck.select(_index([x.seen.row], device)) for x in unmet]
        rows = last.select(_index([x.row for x in unmet], device))
        then = replace(
            rows,
            index=index,
            latents_BLD=rows.latents_BLD[:, :count],
            bottleneck=Bottleneck(
                torch.cat([x.codes_BLC for x in parts]),
                torch.cat([x.continuous_BLC for x in parts]),
                None,
            ),
        )

        def near(part: Iteration) -> Tensor:
            error_B = judged(criterion, part, self.model).error_B
            assert error_B is not None
            return error_B <= limit_B

        return self._fewest(then, torch.full_like(then.image_index_B, count), near).tolist()


def _index(rows: list[int], device: torch.device) -> Tensor:
    """Index tensor of rows, copied to the device without waiting for it."""
    index = torch.tensor(rows)
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _on_host(found: Verdict, longest: int) -> tuple[list[int], list[float]]:
    """Token counts, 0 for images that are not done, and errors, if any, in one copy from the device."""
    if found.error_B is None:
        return [n if n <= longest else 0 for n in found.tokens_B.tolist()], []
    tokens, errors = torch.stack([found.tokens_B.double(), found.error_B.double()]).tolist()
    return [int(n) if n <= longest else 0 for n in tokens], errors


def tokens_of(model: AdaptiveModel, bottleneck: Bottleneck, row: int, count: int) -> TokenSequence:
    """First ``count`` tokens of one image: indices, or latents where there is no quantizer."""
    return first_tokens(model, bottleneck, count, slice(row, row + 1))


def first_tokens(
    model: AdaptiveModel, bottleneck: Bottleneck, count: int, rows: slice = slice(None)
) -> TokenSequence:
    """First ``count`` tokens of all images that were read out together, or of some rows."""
    latents_BLC = bottleneck.continuous_BLC[rows, :count]
    lengths = torch.full((len(latents_BLC),), count, device=latents_BLC.device)
    if bottleneck.index_BL is None or model.config.quirks.unquantized_tokens:
        return TokenSequence(lengths, latents=latents_BLC.flatten(0, 1).clone())
    return TokenSequence(lengths, indices=bottleneck.index_BL[rows, :count].flatten().clone())
