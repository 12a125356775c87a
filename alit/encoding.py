"""Adaptive encoding: the criterion is asked after every iteration, and an image leaves as soon as it is done.

``encode`` takes one batch to its end; ``encode_stream`` refills the places of finished images, so that images at
different iterations share one packed batch: attention is ragged, and the encoder's weights are the same at each
iteration. Both are methods of :class:`alit.AdaptiveTokenizer`, and run one loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import BaseTokens
from .criteria import ErrorCriterion, FixedLength
from .criterion import Criterion, Prepared
from .curves import measured
from .iteration import Iteration
from .length_head import KINDS, curve_lengths
from .model import AdaptiveModel
from .prediction import Budget
from .rollout import Rollout, encode_together
from .selection import Running, Selection, first_tokens, tokens_of
from .sequence import TokenSequence


@dataclass(frozen=True)
class Progress:
    """State of :func:`encode_stream` after one step of the encoder.

    Attributes:
        steps: encoder runs so far.
        images_done, images_started: how many images have been finished, and taken from the source.
        rows: encoder rows (class, image and latent tokens) of this step, at most ``max_tokens_in_flight``.
    """

    steps: int
    images_done: int
    images_started: int
    rows: int


@torch.no_grad()
def encode(
    model: AdaptiveModel,
    images: Tensor,
    criterion: Criterion,
    *,
    base: BaseTokens | None = None,
    generator: torch.Generator | None = None,
) -> TokenSequence:
    """Tokens of each image, as many as the criterion asks for; no gradients.

    An image leaves the batch as soon as it is done, or after the last iteration, and keeps no tokens that do not help.
    With a :class:`FixedLength` of one number, and without halting that drops tokens, nothing waits for the device, and
    a CUDA graph can capture it.

    Args:
        images: (B, 3, height, width) floating point in [0, 1], of the configured size.
        criterion: of :mod:`alit.criteria`, or anything with their protocol; :mod:`alit.selection` has the rules.
        base, generator: as for :class:`alit.Rollout`.

    Returns:
        Indices, or (without a quantizer) continuous latents. Under ``Quirks.unquantized_tokens`` always latents.

    Raises:
        TypeError, ValueError: as ``rollout``; a criterion that does not fit the model, or gives anything but (B,) bool.
    """
    select = Selection(model, criterion)
    if isinstance(criterion, Prepared):
        criterion.check(model, len(images))
    if isinstance(criterion, Budget) and model.length_head is None:
        return _encode_by_search(model, images, criterion, base, generator)
    rollout = Rollout(model, images, base=base, predict_at=select.predict_at, generator=generator)
    if model.config.quirks.batch_mean_criterion and isinstance(criterion, ErrorCriterion):
        return _encode_by_batch_mean(model, list(rollout), criterion)
    if isinstance(criterion, FixedLength) and not criterion.tokens.ndim:
        for iteration in rollout:
            if iteration.num_tokens >= criterion.tokens:
                return first_tokens(model, iteration.bottleneck, int(criterion.tokens))
    running = select.start(rollout)
    while select.take(running, *encode_together([rollout])):
        pass
    return TokenSequence.concatenate([select.finished[i] for i in range(len(images))])


def _encode_by_search(
    model: AdaptiveModel,
    images: Tensor,
    criterion: Budget,
    base: BaseTokens | None,
    generator: torch.Generator | None,
) -> TokenSequence:
    """All iterations, and the error at every length; then the tokens that the budget gives each image."""
    curves = measured(model, images, base=base, generator=generator)
    errors_BP = curves.errors_BKP[:, KINDS.index("l1")].cpu()
    found = []
    for row, count in enumerate(criterion.spent(errors_BP, curve_lengths(model.config))):
        bottleneck = curves.bottlenecks[(count - 1) // model.config.latents_per_iteration]
        found.append(tokens_of(model, bottleneck, row, count))
    return TokenSequence.concatenate(found)


def _encode_by_batch_mean(
    model: AdaptiveModel, iterations: list[Iteration], criterion: ErrorCriterion
) -> TokenSequence:
    """The published rule: all iterations, then the first whose mean error is below the threshold, else the best."""
    errors = [float(criterion.error(iteration, model).mean()) for iteration in iterations]
    best = min(range(len(errors)), key=errors.__getitem__)
    fallback = best if model.config.quirks.best_iteration_fallback else -1
    below = (i for i, error in enumerate(errors) if error < criterion.threshold)
    chosen = iterations[next(below, fallback)]
    return first_tokens(model, chosen.bottleneck, chosen.num_tokens)


def encode_stream(
    model: AdaptiveModel,
    images: Iterable[Tensor],
    criterion: Criterion,
    *,
    max_tokens_in_flight: int,
    generator: torch.Generator | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[TokenSequence]:
    """Tokens of any number of images, one after another in their order, in bounded memory; no gradients.

    New images take the places of finished ones, so images at different iterations share each run of the encoder.
    The source is read as places become free, never further ahead.

    Args:
        images: (3, height, width) each, otherwise as for :func:`encode`.
        criterion: as for :func:`encode`; sees the images that are at one iteration and came together as a batch,
            with ``image_index_B`` counted over the whole stream.
        max_tokens_in_flight: bound on the rows (class, image and latent tokens) of one run of the encoder, and so
            on memory; at least those of one image at its longest.
        generator: as for :class:`alit.Rollout`.
        on_progress: called with :class:`Progress` after every run of the encoder.

    Raises:
        TypeError, ValueError: as :func:`encode`; a bound too small for one image; a criterion for whole batches, as
            :class:`alit.Budget` is.
    """
    config = model.config
    longest = model.num_image_tokens + config.max_tokens
    if max_tokens_in_flight < longest:
        raise ValueError(
            f"max_tokens_in_flight: expected at least {longest}, one image at its longest, got {max_tokens_in_flight}"
        )
    if config.quirks.batch_mean_criterion and isinstance(criterion, ErrorCriterion):
        raise ValueError(
            "criterion: the published rule (Quirks.batch_mean_criterion) gives a batch one length, a stream has none"
        )
    if isinstance(criterion, Budget):
        raise ValueError(
            "criterion: a Budget is for images that are known together, as encode has them; for a stream, expected the "
            "FixedLength that alit.allocation.allocated makes of their alit.curves.l1_curves"
        )
    if isinstance(criterion, Prepared):
        criterion.check(model)
    return _stream(model, iter(images), criterion, max_tokens_in_flight, generator, on_progress)


@torch.no_grad()
def _stream(
    model: AdaptiveModel,
    source: Iterator[Tensor],
    criterion: Criterion,
    max_rows: int,
    generator: torch.Generator | None,
    on_progress: Callable[[Progress], None] | None,
) -> Iterator[TokenSequence]:
    select = Selection(model, criterion)
    given = criterion.images if isinstance(criterion, Prepared) else None
    live: list[Running] = []
    steps = started = emitted = 0
    while True:
        fresh = _admit(model, source, live, max_rows, started)
        if given is not None and started + len(fresh) > given:
            raise ValueError(f"tokens: expected one length per image, got {given} for more images")
        if fresh:
            batch = torch.stack(fresh)
            rollout = Rollout(model, batch, predict_at=select.predict_at, generator=generator)
            live.append(select.start(rollout, started))
            started += len(fresh)
        if not live:
            return
        rollouts = [running.rollout for running in live]
        rows = sum(rollout.rows for rollout in rollouts)
        encoded = encode_together(rollouts)
        live = [x for x, rows_BSD in zip(live, encoded, strict=True) if select.take(x, rows_BSD)]
        steps += 1
        if on_progress is not None:
            on_progress(Progress(steps, emitted + len(select.finished), started, rows))
        while emitted in select.finished:
            yield select.finished.pop(emitted)
            emitted += 1


def _admit(
    model: AdaptiveModel, source: Iterator[Tensor], live: list[Running], max_rows: int, first: int
) -> list[Tensor]:
    """As many images as fit now and at every later step, even if none finishes early; they count from ``first``."""
    ages = Counter({x.rollout.index: x.rollout.batch_size for x in live})
    shape = (3, *model.config.image_size)
    fresh: list[Tensor] = []
    while True:
        ages[0] += 1
        if _peak(model, ages) > max_rows:
            return fresh
        image = next(source, None)
        if image is None:
            return fresh
        if image.shape != shape:
            found = f"{tuple(image.shape)} for image {first + len(fresh)}"
            raise ValueError(f"images: expected shape {shape}, got {found}")
        fresh.append(image)


def _peak(model: AdaptiveModel, ages: Counter[int]) -> int:
    """Most encoder rows of this step or a later one, for so many images about to run each iteration."""
    config = model.config

    def rows(ahead: int) -> int:
        return sum(
            count
            * (model.num_image_tokens + config.latents_per_iteration * (iteration + ahead + 1))
            for iteration, count in ages.items()
            if iteration + ahead < config.iterations
        )

    return max(rows(ahead) for ahead in range(config.iterations))
