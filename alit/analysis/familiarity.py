"""Familiarity: errors on changed or other images over those on the images as they are, matched for JPEG size."""

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

#: Most pieces that a side is cut into for shuffling.
PIECES = 8


@dataclass(frozen=True)
class Difference:
    """Mean of a quantity over images; its excess over that of the images as they are; the excess matched for JPEG size.

    Matched: excess over the least-squares line of the images as they are, on the logarithm of their JPEG size, at the
    JPEG sizes of these images. Where these lie beyond those of the line (``Kind.beyond``), the line is extrapolated.
    """

    mean: float
    more: Interval
    matched: Interval


@dataclass(frozen=True)
class Kind:
    """Result for one kind of images: as they are, changed in one way, or of the second folder.

    Attributes:
        jpeg: mean bytes as JPEG.
        beyond: share of images whose JPEG size is outside the range of the images as they are.
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
    """Result of :func:`familiarity`; ``kinds`` begins with the images as they are."""

    lengths: list[int]
    thresholds: list[float]
    kinds: list[Kind]


def shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Image (3, height, width) with its pieces in random order, 8 (or the next smaller divisor) down and across."""
    down, across = (max(n for n in range(1, PIECES + 1) if x % n == 0) for x in image.shape[1:])
    height, width = image.shape[1] // down, image.shape[2] // across
    pieces = image.reshape(3, down, height, across, width).permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(len(pieces), generator=generator)
    mixed = pieces[order].unflatten(0, (down, across))
    return mixed.permute(2, 0, 3, 1, 4).reshape(image.shape)


def phase_scrambled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Image (3, height, width) with random phases added to its Fourier phases, alike in all channels; not clamped."""
    noise = torch.fft.fft2(torch.rand(image.shape[1:], generator=generator, dtype=torch.float64))
    turn = noise / noise.abs()
    turn[0, 0] = 1  # the mean stays
    return torch.fft.ifft2(torch.fft.fft2(image.double()) * turn).real.float()


#: Changes of an image (3, height, width) in [0, 1], by name.
CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "mirrored": lambda image, _: image.flip(2),
    "upside down": lambda image, _: image.flip(1),
    "BGR": lambda image, _: image.flip(0),
    "negative": lambda image, _: 1 - image,
    "shuffled patches": shuffled,
    "phase scrambled": phase_scrambled,
}
#: Names of two kinds: the images as they are, and those of the second folder.
AS_THEY_ARE, SECOND = "as they are", "second folder"


def changed(levels: Tensor, name: str, seed: int) -> Tensor:
    """Images (N, 3, height, width) uint8, all changed in the way ``name``; image n draws from seed ``seed + n``."""
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
    """Measure each kind of images and compare it with the images as they are, whose errors are ``errors_NK``."""
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
    """Gallery of one image changed in each way, an image of the second folder, and reconstructions from all tokens."""
    one = data.levels[number : number + 1]
    names = [AS_THEY_ARE, *CHANGES]
    # The draws that changed this image among all: image n draws from seed + n.
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
