"""Adaptive encoding: the criterion is asked after every iteration, and an image leaves as soon as it is done.

``encode`` takes one batch to its end; ``encode_stream`` refills the places of finished images, so that images at
different iterations share one packed batch: attention is ragged, and the encoder's weights are the same at each
iteration. Both are methods of :class:`alit.AdaptiveTokenizer`, and run one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .admission import Waiting
from .base import BaseTokens
from .criteria import ErrorCriterion, FixedLength
from .criterion import Criterion, Prepared
from .curves import l1_curves, measured
from .iteration import Iteration
from .length_head import KINDS, curve_lengths
from .model import AdaptiveModel
from .prediction import Budget
from .rollout import Rollout, encode_together, rollouts_of
from .selection import Running, Selection, first_tokens, tokens_of
from .sequence import TokenSequence
from .sizes import Grid, Places


@dataclass(frozen=True)
class Progress:
    """State of :func:`encode_stream` after one step of the encoder.

    Attributes:
        steps: encoder runs so far.
        images_done, images_started: how many images have been finished, and taken from the source.
        images_unmet: how many of them no number of tokens made meet the criterion.
        rows: encoder rows (class, image and latent tokens) of this step, at most ``max_tokens_in_flight``.
    """

    steps: int
    images_done: int
    images_started: int
    images_unmet: int
    rows: int


def sized(tokens: TokenSequence, sizes: Sequence[tuple[int, ...]]) -> TokenSequence:
    """Copy of the tokens with the (height, width) of each of their images as ``sizes``."""
    return replace(tokens, sizes=torch.tensor(sizes, dtype=torch.int64, device="cpu"))


def check_given(images: Tensor | Sequence[Tensor]) -> None:
    """Raise ``TypeError`` if images are neither a tensor nor a list, ``ValueError`` if there are none."""
    if not isinstance(images, Tensor | list | tuple):
        kind = type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor or a list of them, got {kind}")
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")


@torch.no_grad()
def encode(
    model: AdaptiveModel,
    images: Tensor | Sequence[Tensor],
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
        images: (B, 3, height, width) floating point in [0, 1], of the configured size; or a list of (3, height, width)
            of any sizes, multiples of the base's patch. They share each run of the encoder; a criterion sees those of
            one size as a batch. With a list ``base`` is None.
        criterion: of :mod:`alit.criteria`, or anything with their protocol; :mod:`alit.selection` has the rules.
        base, generator: as for :class:`alit.Rollout`.

    Returns:
        Indices, or (without a quantizer) continuous latents. Under ``Quirks.unquantized_tokens`` always latents.

    Raises:
        TypeError, ValueError: as ``rollout``, with the image's number where there is a list (``images[3]: ...``); a
            criterion that does not fit the model, or gives anything but (B,) bool.
    """
    check_given(images)
    if isinstance(criterion, Prepared):
        criterion.check(model, len(images))
    if isinstance(criterion, Budget):
        if not isinstance(images, Tensor):
            curves = l1_curves(model, images)
            criterion = FixedLength(criterion.spent(curves, curve_lengths(model.config)))
        elif model.length_head is None:
            return _encode_by_search(model, images, criterion, base, generator)
    select = Selection(model, criterion)
    live = _started(select, images, base, generator)
    sizes = [tuple(image.shape[-2:]) for image in images]
    if model.config.quirks.batch_mean_criterion and isinstance(criterion, ErrorCriterion):
        if len(live) > 1:
            raise ValueError(
                "images: the published rule (Quirks.batch_mean_criterion) takes those of one size"
            )
        return sized(_encode_by_batch_mean(model, list(live[0].rollout), criterion), sizes)
    if isinstance(criterion, FixedLength) and not criterion.tokens.ndim and len(live) == 1:
        for iteration in live[0].rollout:
            if iteration.num_tokens >= criterion.tokens:
                tokens = first_tokens(model, iteration.bottleneck, int(criterion.tokens))
                return sized(tokens, sizes)
    while live:
        live = _step(select, live)
    return sized(TokenSequence.concatenate([select.finished[i] for i in range(len(images))]), sizes)


def _started(
    select: Selection,
    images: Tensor | Sequence[Tensor],
    base: BaseTokens | None,
    generator: torch.Generator | None,
) -> list[Running]:
    """Running rollouts before their first iteration: one for a batch, one for each image size of a list."""
    options: dict[str, Any] = {"predict_at": select.predict_at, "generator": generator}
    if isinstance(images, Tensor):
        return [
            select.start(Rollout(select.model, images, base=base, **options), range(len(images)))
        ]
    if base is not None:
        raise ValueError("base: expected None with a list of images, whose sizes may differ")
    return [select.start(*each) for each in rollouts_of(select.model, images, **options)]


def _step(select: Selection, live: list[Running]) -> list[Running]:
    """Run one iteration of all rollouts; returns those with images left."""
    encoded = encode_together([running.rollout for running in live])
    return [x for x, rows_BSD in zip(live, encoded, strict=True) if select.take(x, rows_BSD)]


def _encode_by_search(
    model: AdaptiveModel,
    images: Tensor,
    criterion: Budget,
    base: BaseTokens | None,
    generator: torch.Generator | None,
) -> TokenSequence:
    """Encode by a budget without length head: measure the error at every length, then keep the tokens that it gives."""
    curves = measured(model, images, base=base, generator=generator)
    errors_BP = curves.errors_BKP[:, KINDS.index("l1")].cpu()
    found = []
    for row, count in enumerate(criterion.spent(errors_BP, curve_lengths(model.config))):
        bottleneck = curves.bottlenecks[(count - 1) // model.config.latents_per_iteration]
        found.append(tokens_of(model, bottleneck, row, count))
    return sized(TokenSequence.concatenate(found), [tuple(images.shape[2:])] * len(images))


def _encode_by_batch_mean(
    model: AdaptiveModel, iterations: list[Iteration], criterion: ErrorCriterion
) -> TokenSequence:
    """Encode by the published rule: all iterations, then the first whose mean error is below the threshold, else the
    last (with ``Quirks.best_iteration_fallback`` the best).
    """
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
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[TokenSequence]:
    """Iterator over the tokens of any number of images, in their order, in bounded memory; no gradients.

    New images take the places of finished ones, so images at different iterations share each run of the encoder.
    The source is read as places become free, and at most one image further ahead, where the next one is too large.

    Args:
        images: (3, height, width) each, of any sizes, as in the lists that :func:`encode` takes.
        criterion: as for :func:`encode`; sees the images that are at one iteration, came together and are of one size
            as a batch, with ``image_index_B`` counted over the whole stream.
        max_tokens_in_flight: bound on the rows (class, image and latent tokens) of one run of the encoder, and so
            on memory; at least those of one image of the configured size at its longest.
        generator: as for :class:`alit.Rollout`.
        on_progress: called with :class:`Progress` after every run of the encoder.

    Raises:
        TypeError, ValueError: as :func:`encode`; a bound too small for an image; a criterion for whole batches, as
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
    on_progress: Callable[[Progress], None],
) -> Iterator[TokenSequence]:
    select = Selection(model, criterion)
    given = criterion.images if isinstance(criterion, Prepared) else None
    waiting = Waiting(model, source, max_rows)
    known: dict[Grid, Places] = {}
    sizes: dict[int, tuple[int, ...]] = {}  # of images whose tokens were not yielded yet
    live: list[Running] = []
    steps = started = emitted = 0
    while True:
        fresh = waiting.admit([running.rollout for running in live])
        if given is not None and started + len(fresh) > given:
            raise ValueError(f"tokens: expected one length per image, got {given} for more images")
        if fresh:
            options = {"predict_at": select.predict_at, "generator": generator}
            rollouts = rollouts_of(model, fresh, first=started, known=known, **options)
            live += [select.start(*each) for each in rollouts]
            sizes |= {started + b: tuple(image.shape[1:]) for b, image in enumerate(fresh)}
            started += len(fresh)
        if not live:
            return
        rows = sum(running.rollout.rows for running in live)
        live = _step(select, live)
        steps += 1
        done = emitted + len(select.finished)
        on_progress(Progress(steps, done, started, select.unmet, rows))
        while emitted in select.finished:
            yield sized(select.finished.pop(emitted), [sizes.pop(emitted)])
            emitted += 1
