"""Complexity: correlation of token counts with people's scores, JPEG size and entropy of gray levels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..demo.sheet import Tile
from ..evaluation import tokens_needed
from ..images import to_image
from ..tokenizer import AdaptiveTokenizer
from .gallery import Gallery
from .inputs import ImageSet
from .rollouts import reconstructions
from .statistics import Interval, spearman

#: Values of L1 at which tokens are counted.
THRESHOLDS = (0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
#: Quality of the JPEG files whose sizes are a yardstick.
JPEG_QUALITY = 90
#: Most plain images, and most busy ones, on the sheet.
SHOWN = 6


@dataclass(frozen=True)
class Threshold:
    """Tokens needed until L1 is below ``max_l1``, and their correlations.

    Attributes:
        tokens: mean over images; those of which no length gets there count with all tokens.
        met: share of images of which some length gets there.
        scores: Spearman correlation of tokens with people's scores; None where there are none.
        scores_given_first: the partial correlation, given L1 after the first iteration: what further iterations add.
        jpeg, entropy: Spearman correlation of tokens with the size of a JPEG file, and with the entropy of gray levels.
    """

    max_l1: float
    tokens: float
    met: float
    scores: Interval | None
    scores_given_first: Interval | None
    jpeg: Interval
    entropy: Interval


@dataclass(frozen=True)
class ImageComplexity:
    """Complexity of one image: ``l1`` after each iteration, bytes as JPEG, bits of gray entropy, score (or None)."""

    name: str
    l1: list[float]
    jpeg: int
    entropy: float
    score: float | None


@dataclass(frozen=True)
class Complexity:
    """Result of :func:`complexity`.

    ``jpeg``, ``entropy``, ``first``: yardsticks, Spearman correlation of people's scores with JPEG size, gray entropy
    and L1 after the first iteration; None where there are no scores.
    """

    thresholds: list[Threshold]
    jpeg: Interval | None
    entropy: Interval | None
    first: Interval | None
    images: list[ImageComplexity]


def jpeg_sizes(levels: Tensor) -> list[int]:
    """Bytes of each image (N, 3, height, width) uint8 as a JPEG file of quality 90."""
    sizes = []
    for image in levels:
        file = io.BytesIO()
        to_image(image.float() / 255).save(file, "JPEG", quality=JPEG_QUALITY)
        sizes.append(file.tell())
    return sizes


def gray_entropy(levels: Tensor) -> list[float]:
    """Entropy of the histogram of 256 gray levels of each image (N, 3, height, width) uint8, in bits per pixel."""
    found = []
    for image in levels:
        gray = to_image(image.float() / 255).convert("L")
        share = torch.tensor(gray.histogram(), dtype=torch.float64) / (gray.width * gray.height)
        found.append(float(torch.special.entr(share).sum()) / torch.log(torch.tensor(2.0)).item())
    return found


def complexity(
    data: ImageSet,
    errors_NK: Tensor,
    lengths: Sequence[int],
    scores: Sequence[float] | None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
) -> Complexity:
    """Complexity at each threshold, from errors as :func:`alit.analysis.rollouts.errors` returns them."""
    jpeg, entropy = jpeg_sizes(data.levels), gray_entropy(data.levels)
    first = errors_NK[:, 0].numpy()
    found = []
    for limit in thresholds:
        tokens, met = tokens_needed(errors_NK, lengths, limit)
        of_scores = None if scores is None else spearman(tokens, scores, seed=seed)
        given = None if scores is None else spearman(tokens, scores, given=first, seed=seed)
        found.append(
            Threshold(
                *(limit, float(tokens.double().mean()), float(met.double().mean())),
                *(of_scores, given),
                *(spearman(tokens, x, seed=seed) for x in (jpeg, entropy)),
            )
        )
    yardsticks: list[Interval | None] = [None] * 3
    if scores is not None:
        yardsticks = [spearman(scores, x, seed=seed) for x in (jpeg, entropy, first)]
    each = [None] * len(data) if scores is None else scores
    rows = zip(data.names, errors_NK.tolist(), jpeg, entropy, each, strict=True)
    jpeg_r, entropy_r, first_r = yardsticks
    return Complexity(found, jpeg_r, entropy_r, first_r, [ImageComplexity(*row) for row in rows])


def gallery(model: AdaptiveTokenizer, data: ImageSet, errors_NK: Tensor, limit: float) -> Gallery:
    """Gallery of the plainest and busiest images, by tokens and then by error, reconstructed from those tokens."""
    tokens, met = tokens_needed(errors_NK, model.config.lengths, limit)
    order = sorted(range(len(tokens)), key=lambda n: (int(tokens[n]), float(errors_NK[n].min())))
    each = min(SHOWN, len(order) // 2)
    rows = []
    for title, chosen in (("plainest", order[:each]), ("busiest", order[-each:])):
        images = data.levels[chosen].float() / 255
        shown = reconstructions(model, images)
        steps = (tokens[chosen] // model.config.latents_per_iteration - 1).tolist()
        above, below = [Tile(title)], [Tile("what they show")]
        for b, (n, step) in enumerate(zip(chosen, steps, strict=True)):
            count = f"{int(tokens[n])} tokens" if met[n] else f"more than {int(tokens[n])}"
            above.append(Tile(count, images[b]))
            below.append(Tile(f"L1 {float(errors_NK[n, step]):.3f}", shown[step][b]))
        rows += [above, below]
    return Gallery(f"The plainest and the busiest images, at L1 below {limit:g}", rows, 2)
