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
from .criteria import Criterion, ErrorCriterion, FixedLength
from .iteration import Iteration
from .model import AdaptiveModel
from .rollout import Rollout, encode_together, rollouts_of
from .sequence import TokenSequence
from .sizes import Grid, Places


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


class Selection:
    """Asks the criterion about each iteration and keeps the tokens of the images that are done.

    Attributes:
        predict_at: what the criterion wants predicted: all iterations (None), or none.
        finished: an image's index to its tokens.

    Raises:
        TypeError: the criterion is none, or gives no tensor.
        ValueError: it gives one of another shape or dtype than (B,) bool.
    """

    def __init__(self, model: AdaptiveModel, criterion: Criterion) -> None:
        needed = getattr(criterion, "needs_prediction", None)
        if not callable(criterion) or not isinstance(needed, bool):
            raise TypeError(
                "criterion: expected FixedLength, MaxL1, CodeError, TokenAccuracy or another callable with a bool "
                f"attribute needs_prediction, got {type(criterion).__name__}"
            )
        self.model, self.criterion = model, criterion
        self.predict_at = None if needed else ()
        self.finished: dict[int, TokenSequence] = {}
        self._best: dict[int, tuple[float, TokenSequence]] = {}
        self._by_error = (
            criterion
            if isinstance(criterion, ErrorCriterion) and model.config.quirks.best_iteration_fallback
            else None
        )

    def take(self, running: Rollout, encoded_BSD: Tensor) -> bool:
        """One more iteration of a rollout; images that are done leave it. Whether any are left."""
        iteration = running.advance(encoded_BSD)
        done = self.criterion(iteration, self.model)
        expected = f"criterion: expected {type(self.criterion).__name__} to give ({iteration.batch_size},) bool"
        if not isinstance(done, Tensor):
            raise TypeError(f"{expected}, got {type(done).__name__}")
        if done.shape != (iteration.batch_size,) or done.dtype != torch.bool:
            raise ValueError(f"{expected}, got {tuple(done.shape)} {done.dtype}")
        last = iteration.index == self.model.config.iterations - 1
        images = iteration.image_index_B.tolist()
        if self._by_error is not None:
            errors = self._by_error.error(iteration, self.model).tolist()
            for row, (image, error) in enumerate(zip(images, errors, strict=True)):
                if image not in self._best or error < self._best[image][0]:
                    self._best[image] = (error, tokens_of(self.model, iteration, row))
        left = 0
        for row, (image, is_done) in enumerate(zip(images, done.tolist(), strict=True)):
            if is_done or (last and self._by_error is None):
                self.finished[image] = tokens_of(self.model, iteration, row)
            elif last:
                self.finished[image] = self._best[image][1]
            else:
                left += 1
        if left:
            running.keep(~done)
        return left > 0


def tokens_of(model: AdaptiveModel, iteration: Iteration, row: int) -> TokenSequence:
    """The tokens of one image of an iteration: indices, or latents where there is no quantizer."""
    return tokens_of_all(model, iteration, slice(row, row + 1))


def tokens_of_all(
    model: AdaptiveModel, iteration: Iteration, rows: slice = slice(None)
) -> TokenSequence:
    """The tokens of the images of an iteration."""
    bottleneck = iteration.bottleneck
    latents_BLC = bottleneck.continuous_BLC[rows]
    lengths = torch.full((len(latents_BLC),), iteration.num_tokens, device=latents_BLC.device)
    if bottleneck.quantized is None or model.config.quirks.unquantized_tokens:
        return TokenSequence(lengths, latents=latents_BLC.flatten(0, 1).clone())
    return TokenSequence(lengths, indices=bottleneck.quantized.index[rows].flatten().clone())


def sized(tokens: TokenSequence, sizes: Sequence[tuple[int, ...]]) -> TokenSequence:
    """With height and width of each of their images."""
    return replace(tokens, sizes=torch.tensor(sizes, dtype=torch.int64, device="cpu"))


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

    An image leaves the batch as soon as it is done, or after the last iteration. With a :class:`FixedLength` of one
    number, and without halting that drops tokens, nothing waits for the device, and a CUDA graph can capture it.

    Args:
        images: (B, 3, height, width) floating point in [0, 1], of the configured size; or a list of (3, height, width)
            of any sizes, multiples of the base's patch. They share each run of the encoder; a criterion sees those of
            one size as a batch. With a list ``base`` is None.
        criterion: :class:`FixedLength`, :class:`MaxL1`, :class:`CodeError`, :class:`TokenAccuracy` or anything with
            their protocol.
        base, generator: as for :class:`alit.Rollout`.

    Returns:
        Indices, or (without a quantizer) continuous latents. Under ``Quirks.unquantized_tokens`` always latents.

    Raises:
        TypeError, ValueError: as ``rollout``, with the image's number where there is a list (``images[3]: ...``); a
            criterion that does not fit the model, or gives anything but (B,) bool.
    """
    select = Selection(model, criterion)
    options: dict[str, Any] = {"predict_at": select.predict_at, "generator": generator}
    live = _rollouts(model, images, base, options)
    sizes = [tuple(image.shape[-2:]) for image in images]
    if isinstance(criterion, FixedLength):
        criterion.check(model, len(images))
    if model.config.quirks.batch_mean_criterion and isinstance(criterion, ErrorCriterion):
        if len(live) > 1:
            raise ValueError(
                "images: the published rule (Quirks.batch_mean_criterion) takes those of one size"
            )
        return sized(_encode_by_batch_mean(model, list(live[0]), criterion), sizes)
    if isinstance(criterion, FixedLength) and not criterion.tokens.ndim and len(live) == 1:
        for iteration in live[0]:
            if iteration.num_tokens >= criterion.tokens:
                return sized(tokens_of_all(model, iteration), sizes)
    while live:
        encoded = encode_together(live)
        live = [x for x, rows_BSD in zip(live, encoded, strict=True) if select.take(x, rows_BSD)]
    tokens = TokenSequence.concatenate([select.finished[i] for i in range(len(images))])
    return sized(tokens, sizes)


def _rollouts(
    model: AdaptiveModel,
    images: Tensor | Sequence[Tensor],
    base: BaseTokens | None,
    options: dict[str, Any],
) -> list[Rollout]:
    if not isinstance(images, list | tuple):
        return [Rollout(model, images, base=base, **options)]  # type: ignore[arg-type]  # checked there
    if base is not None:
        raise ValueError("base: expected None with a list of images, whose sizes may differ")
    if not images:
        raise ValueError("images: expected at least one, got none")
    return rollouts_of(model, images, **options)


def _encode_by_batch_mean(
    model: AdaptiveModel, iterations: list[Iteration], criterion: ErrorCriterion
) -> TokenSequence:
    """The published rule: all iterations, then the first whose mean error is below the threshold, else the best."""
    errors = [float(criterion.error(iteration, model).mean()) for iteration in iterations]
    best = min(range(len(errors)), key=errors.__getitem__)
    fallback = best if model.config.quirks.best_iteration_fallback else -1
    below = (i for i, error in enumerate(errors) if error < criterion.threshold)
    chosen = iterations[next(below, fallback)]
    return TokenSequence.concatenate(
        [tokens_of(model, chosen, row) for row in range(chosen.batch_size)]
    )


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
        TypeError, ValueError: as :func:`encode`; a bound too small for an image; a criterion for whole batches.
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
    if isinstance(criterion, FixedLength):
        criterion.check(model, criterion.tokens.numel())
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
    waiting = Waiting(model, source, max_rows)
    known: dict[Grid, Places] = {}
    sizes: dict[int, tuple[int, ...]] = {}  # of those that have not been given back
    live: list[Rollout] = []
    steps = started = emitted = 0
    while True:
        fresh = waiting.admit(live)
        if isinstance(criterion, FixedLength) and criterion.tokens.ndim:
            given = len(criterion.tokens)
            if started + len(fresh) > given:
                raise ValueError(
                    f"tokens: expected one length per image, got {given} for more images"
                )
        if fresh:
            options = {"predict_at": select.predict_at, "generator": generator}
            live += rollouts_of(model, fresh, first=started, known=known, **options)
            sizes |= {started + b: tuple(image.shape[1:]) for b, image in enumerate(fresh)}
            started += len(fresh)
        if not live:
            return
        rows = sum(running.rows for running in live)
        encoded = encode_together(live)
        live = [x for x, rows_BSD in zip(live, encoded, strict=True) if select.take(x, rows_BSD)]
        steps += 1
        if on_progress is not None:
            on_progress(Progress(steps, emitted + len(select.finished), started, rows))
        while emitted in select.finished:
            yield sized(select.finished.pop(emitted), [sizes.pop(emitted)])
            emitted += 1
