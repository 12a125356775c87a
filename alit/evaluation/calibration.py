"""Calibration of criteria: the error asked for against the error of the decoded tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..base import Prediction
from ..criteria import CodeError, MaxL1, Measured, MinSSIM, RelativeL1
from ..criterion import Criterion
from ..images import MAX_MEGAPIXELS
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from .inputs import Reading
from .simple import Drawing

#: A criterion that measures an error, or a pair: one that only predicts it, and one that measures it, at one limit.
Asked = Measured | tuple[Criterion, Measured]
#: Kinds of criteria that are calibrated by default.
USUAL = (MaxL1, RelativeL1, MinSSIM, CodeError)


@dataclass(frozen=True)
class Calibration:
    """Calibration of one criterion at one limit, over all images.

    Attributes:
        criterion: name of its class.
        limit: the error that was asked for; for MinSSIM, 1 - SSIM.
        met: share of images for which some length has an error below the limit.
        tokens, error: means over images; the error is that of the decoded tokens.
        within: share of images whose error is below the limit.
    """

    criterion: str
    limit: float
    met: float
    tokens: float
    error: float
    within: float


@torch.no_grad()
def calibrate(
    model: AdaptiveTokenizer,
    data: Sequence[Path] | Sequence[Drawing],
    criteria: Sequence[Asked],
    *,
    protocol: str = "pinned",
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Calibration]:
    """Encode and decode images by each criterion, and compare the error got with the error asked for.

    Args:
        criteria: criteria that measure an error, at the limits of interest; one that only predicts an error comes with
            the criterion that measures it: ``(Foresees(0.08), MaxL1(0.08))``.
        others: as for :func:`alit.evaluation.evaluate`.

    Raises:
        ValueError: as :func:`alit.evaluation.evaluate`; no criterion.
        TypeError: a criterion that measures no error, alone.
    """
    pairs = [_pair(x) for x in criteria]
    if not pairs:
        raise ValueError("criteria: expected at least one, got none")
    reading = Reading(data, model.config, protocol, batch_size, max_megapixels)
    rows: list[list[Tensor]] = [[] for _ in pairs]
    for images in reading:
        for row, found in zip(rows, _measured(model, images, pairs), strict=True):
            row.append(found)
        on_batch(reading.done)
    return [
        Calibration(
            type(criterion).__name__, float(measure.limit), *torch.cat(row).mean(0).tolist()
        )
        for (criterion, measure), row in zip(pairs, rows, strict=True)
    ]


def _pair(asked: Asked) -> tuple[Criterion, Measured]:
    criterion, measure = asked if isinstance(asked, tuple) else (asked, asked)
    if not isinstance(measure, Measured):
        raise TypeError(
            "criteria: expected one that measures an error (MaxL1, RelativeL1), or a pair with one, got "
            f"{type(measure).__name__}"
        )
    return criterion, measure


def _measured(
    model: AdaptiveTokenizer, images: Tensor, pairs: Iterable[tuple[Criterion, Measured]]
) -> list[Tensor]:
    """Values (B, 4) float64 of each pair: met, tokens, error, within."""
    images = images.to(model.latent_tokens.device)
    iterations = list(model.rollout(images))
    last = iterations[-1]
    # The error of each length does not depend on the limit.
    errors: dict[Measured, Tensor] = {}
    found = []
    for criterion, measure in pairs:
        unlimited = replace(measure, threshold=0.0)
        if unlimited not in errors:
            each = [measure.error(iteration, model) for iteration in iterations]
            errors[unlimited] = torch.stack(each).amin(0)
        tokens = model.encode(images, criterion, base=last.base)
        got = measure.error(replace(last, prediction=_predicted(model, tokens)), model)
        limit = measure.limit
        values = errors[unlimited] < limit, tokens.lengths, got, got < limit
        found.append(torch.stack([x.double().cpu() for x in values], dim=1))
    return found


def _predicted(model: AdaptiveTokenizer, tokens: TokenSequence) -> Prediction:
    """Prediction of the base tokens by the decoder from tokens alone."""
    if tokens.indices is not None:
        codes_BLC = model.codes(tokens.padded())
    else:
        codes_BLC = tokens.padded()
        if model.config.bottleneck == "quantized":  # Quirks.unquantized_tokens
            codes_BLC = model.quantize(codes_BLC).quantized
    return model.predict(codes_BLC, lengths_B=tokens.lengths)


@torch.no_grad()
def usual_limits(
    model: AdaptiveTokenizer,
    data: Sequence[Path] | Sequence[Drawing],
    *,
    kinds: Sequence[type[Measured]] = USUAL,
    count: int = 5,
    protocol: str = "pinned",
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Measured]:
    """Criteria of these kinds at up to ``count`` limits each, from errors that few lengths reach to those that most do.

    Limits are quantiles, in two digits, of the errors of these images over all lengths, so that they fit any base
    tokenizer. Arguments and exceptions are those of :func:`calibrate`.
    """
    errors: list[list[Tensor]] = [[] for _ in kinds]
    reading = Reading(data, model.config, protocol, batch_size, max_megapixels)
    for images in reading:
        for iteration in model.rollout(images.to(model.latent_tokens.device)):
            for row, kind in zip(errors, kinds, strict=True):
                row.append(kind.within(0.0).error(iteration, model).double().cpu())
        on_batch(reading.done)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return [
        kind.within(limit)
        for row, kind in zip(errors, kinds, strict=True)
        for limit in sorted({float(f"{x:.2g}") for x in torch.cat(row).quantile(shares).tolist()})
    ]
