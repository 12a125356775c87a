"""Reconstruction quality of each length, beside that of a thumbnail and of image files at as many bits.

Protocol "pinned": center square, resized (bicubic) to the model's size; reconstructions clamped and rounded to 8 bits.
Protocol "official": center crop without resizing, reconstructions clamped and truncated to 8 bits, as published.
Everywhere: means over all images, pixels in [0, 1], each image counted once, in order of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..images import MAX_MEGAPIXELS
from ..tokenizer import AdaptiveTokenizer
from . import image_files
from .inputs import Reading
from .iterations import IterationMeasures
from .learned import Frechet, Networks
from .length import Batch, Borders, LengthMeasures
from .metrics import eight_bits, thumbnail
from .results import Evaluation, KindLength, KindQuality
from .simple import Drawing


@torch.no_grad()
def evaluate(
    model: AdaptiveTokenizer,
    data: Sequence[Path] | Sequence[Drawing],
    *,
    protocol: str = "pinned",
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    networks: Networks = Networks(),  # noqa: B008 (immutable)
    on_batch: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Measure reconstruction quality at each length.

    Args:
        model: in evaluation mode, on its device; square images.
        data: files, or drawings of the model's size, see :func:`alit.evaluation.drawings`.
        networks: for LPIPS, rFID and class agreement, see :func:`alit.evaluation.networks`; without, all are left out.
        on_batch: called with the number of images done.

    Raises:
        ValueError: an unknown protocol, none of the files readable, a model whose images are not square, drawings
            of another size.
    """
    config, truncated = model.config, protocol == "official"
    reading = Reading(data, config, protocol, batch_size, max_megapixels)
    lengths = [LengthMeasures(i, config, networks) for i in range(config.iterations)]
    iterations, borders = IterationMeasures(config), Borders()
    frechet = None if networks.inception is None else Frechet(networks.inception)
    limits = [length.bytes for length in lengths]
    for images in reading:
        batch = Batch(images, image_files.of_all(images, limits), networks.classes(images, 1))
        borders.add(images)
        shown: list[Tensor] = []
        rollout = model.rollout(images.to(model.latent_tokens.device))
        for iteration, length in zip(rollout, lengths, strict=True):
            assert iteration.prediction is not None
            ours = eight_bits(model.pixels(iteration.prediction), truncated=truncated).cpu()
            theirs = thumbnail(images, length.bits)
            index_BL = iteration.bottleneck.index_BL
            index_BL = None if index_BL is None else index_BL.cpu()
            length.add(batch, ours, theirs, index_BL)
            shown += [ours, theirs]
        if index_BL is not None:  # of the longest length
            iterations.add(model, images, index_BL, truncated=truncated)
        if frechet is not None:
            frechet.add(images, shown)
        on_batch(reading.done)
    none: list[float | None] = [None] * (2 * len(lengths))
    rfid = none if frechet is None else frechet.distances()
    return Evaluation(
        *(protocol, reading.done, config.image_size),
        [x.result(rfid[2 * i], rfid[2 * i + 1]) for i, x in enumerate(lengths)],
        *(reading.unreadable, borders.result(), iterations.result()),
        kinds_of(reading.drawn, lengths),
    )


def kinds_of(drawn: Sequence[Drawing], lengths: Sequence[LengthMeasures]) -> list[KindQuality]:
    """Mean L1 of each kind of drawing at each length, kinds in order of appearance; empty without drawings."""
    found = []
    for kind in dict.fromkeys(x.kind for x in drawn):
        its = torch.tensor([x.kind == kind for x in drawn])
        rows = [
            KindLength(
                x.tokens, float(x.ours.of("l1")[its].mean()), float(x.theirs.of("l1")[its].mean())
            )
            for x in lengths
        ]
        found.append(
            KindQuality(kind, int(its.sum()), rows, all(x.model < x.thumbnail for x in rows))
        )
    return found
