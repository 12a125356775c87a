"""Familiarity: whether a model is better at images as they are than at others that take as large a JPEG file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..demo.sheet import Tile
from ..evaluation import tokens_needed
from ..images import to_levels
from ..tokenizer import AdaptiveTokenizer
from .complexity import jpeg_sizes
from .gallery import Gallery
from .inputs import ImageSet
from .rollouts import errors, reconstructions
from .statistics import Interval, more

#: Pieces that a side is cut into for shuffling, at most.
PIECES = 8


@dataclass(frozen=True)
class Difference:
    """A mean over images; how much more it is than that of the images as they are; and matched for JPEG size.

    Matched: over the least squares line of the images as they are, on the logarithm of their JPEG size, at the JPEG
    sizes of these. Where these lie beyond the line's images (``Kind.beyond``), the line is prolonged.
    """

    mean: float
    more: Interval
    matched: Interval


@dataclass(frozen=True)
class Kind:
    """Images of one kind: changed in one way, or of the second folder.

    Attributes:
        jpeg: mean bytes as JPEG.
        beyond: the share whose JPEG size no image as it is comes near: outside their smallest and largest.
        l1: L1 at each length.
        tokens: tokens at each threshold.
    """

    name: str
    images: int
    jpeg: float
    beyond: float
    l1: list[Difference]
    tokens: list[Difference]


@dataclass(frozen=True)
class Familiarity:
    """``kinds``: the images as they are first."""

    lengths: list[int]
    thresholds: list[float]
    kinds: list[Kind]


def shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Its pieces, 8 across and down where that divides it, in random order."""
    down, across = (max(n for n in range(1, PIECES + 1) if x % n == 0) for x in image.shape[1:])
    height, width = image.shape[1] // down, image.shape[2] // across
    pieces = image.reshape(3, down, height, across, width).permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(len(pieces), generator=generator)
    mixed = pieces[order].unflatten(0, (down, across))
    return mixed.permute(2, 0, 3, 1, 4).reshape(image.shape)


def phase_scrambled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Every amplitude of its Fourier transform, with random phases added, the same in all channels; not clamped."""
    noise = torch.fft.fft2(torch.rand(image.shape[1:], generator=generator, dtype=torch.float64))
    turn = noise / noise.abs()
    turn[0, 0] = 1  # the mean stays
    return torch.fft.ifft2(torch.fft.fft2(image.double()) * turn).real.float()


#: What is done to an image (3, height, width) in [0, 1], by name.
CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "mirrored": lambda image, _: image.flip(2),
    "upside down": lambda image, _: image.flip(1),
    "BGR": lambda image, _: image.flip(0),
    "negative": lambda image, _: 1 - image,
    "shuffled patches": shuffled,
    "phase scrambled": phase_scrambled,
}
#: Names of the images as they are, and of those of the second folder.
AS_THEY_ARE, SECOND = "as they are", "second folder"


def changed(levels: Tensor, name: str, seed: int) -> Tensor:
    """All images (N, 3, height, width) uint8, changed in one way, in 8 bits; each by its number and ``seed``."""
    found = []
    for number, image in enumerate(levels):
        generator = torch.Generator().manual_seed(seed + number)
        found.append(to_levels(CHANGES[name](image.float() / 255, generator)))
    return torch.stack(found)


def familiarity(
    model: AdaptiveTokenizer,
    data: ImageSet,
    errors_NK: Tensor,
    lengths: Sequence[int],
    second: ImageSet | None,
    *,
    thresholds: Sequence[float],
    batch_size: int = 8,
    seed: int = 0,
) -> Familiarity:
    """Measure the kinds, and hold them against the images as they are, whose errors are given."""
    jpeg = jpeg_sizes(data.levels)
    low, high = min(jpeg), max(jpeg)

    def quantities(errors_NK: Tensor) -> list[Tensor]:
        tokens = (tokens_needed(errors_NK, lengths, limit)[0] for limit in thresholds)
        return [*errors_NK.unbind(1), *tokens]

    def kind(name: str, its_jpeg: list[int], its_errors: Tensor) -> Kind:
        pairs = zip(quantities(errors_NK), quantities(its_errors), strict=True)
        found = [
            Difference(
                float(its.double().mean()),
                *more(own, jpeg, its, its_jpeg, paired=name != SECOND, seed=seed),
            )
            for own, its in pairs
        ]
        beyond = sum(not low <= size <= high for size in its_jpeg) / len(its_jpeg)
        mean_jpeg = sum(its_jpeg) / len(its_jpeg)
        count = len(lengths)
        return Kind(name, len(its_jpeg), mean_jpeg, beyond, found[:count], found[count:])

    kinds = [kind(AS_THEY_ARE, jpeg, errors_NK)]
    for name in [*CHANGES, *([] if second is None else [SECOND])]:
        levels = second.levels if name == SECOND and second else changed(data.levels, name, seed)
        its = errors(model, levels, batch_size=batch_size, doing=f"measuring errors, {name}")
        kinds.append(kind(name, jpeg_sizes(levels), its))
    return Familiarity(list(lengths), list(thresholds), kinds)


def gallery(
    model: AdaptiveTokenizer, data: ImageSet, second: ImageSet | None, number: int, seed: int
) -> Gallery:
    """One image changed in each way, an image of the second folder, and what all tokens show of them."""
    one = data.levels[number : number + 1]
    names = [AS_THEY_ARE, *CHANGES]
    # As all of them were changed: each by its number.
    levels = [one, *(changed(one, name, seed + number) for name in CHANGES)]
    if second is not None:
        names.append(SECOND)
        levels.append(second.levels[len(second) // 2][None])
    images = torch.cat(levels).float() / 255
    last = reconstructions(model, images)[-1]
    off = (last - images).abs().mean((1, 2, 3)).tolist()
    rows = [
        [Tile(name, x) for name, x in zip(names, images, strict=True)],
        [Tile(f"L1 {error:.3f}", x) for error, x in zip(off, last, strict=True)],
    ]
    return Gallery("One image, changed, and what all tokens show of it", rows, 2)
