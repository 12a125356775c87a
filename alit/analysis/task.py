"""Task: share of images to which a classifier gives the same class as to their reconstructions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..demo.sheet import Tile
from ..evaluation import Networks, thumbnail
from ..evaluation.metrics import bits_per_token, eight_bits
from ..plots import BLUE, ORANGE
from ..tokenizer import AdaptiveTokenizer
from .gallery import Gallery
from .inputs import ImageSet, spaced
from .rollouts import reconstructions
from .statistics import Interval, mean

#: Most images on the sheet.
SHOWN = 3


@dataclass(frozen=True)
class Agreement:
    """Share of images whose likeliest class comes first, or among the first five, in what is shown of them."""

    top1: Interval
    top5: Interval


@dataclass(frozen=True)
class Length:
    """Agreement at one length: of reconstructions, and of thumbnails of as many bits."""

    tokens: int
    bits: float
    model: Agreement
    thumbnail: Agreement


class Watcher:
    """Collector of agreement while reconstructions are made: a :data:`alit.analysis.rollouts.Watch`."""

    def __init__(self, model: AdaptiveTokenizer, networks: Networks) -> None:
        self.networks, self.lengths = networks, model.config.lengths
        self.bits = [n * bits_per_token(model.config) for n in self.lengths]
        self.found: list[Tensor] = []  # (B, lengths, 2, 5) bool

    def __call__(self, images: Tensor, shown: list[Tensor]) -> None:
        self.found.append(torch.stack([x for x, _ in self.hits(images, shown)], dim=1))

    def hits(
        self, images: Tensor, shown: list[Tensor]
    ) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Hits (B, 2, 5) at each length, and the pair that they are of: 8-bit reconstructions and thumbnails.

        A hit is True where that one of the five likeliest classes is the likeliest class of the original.
        """
        wanted = self._classes(images, 1)
        found = []
        for bits, pixels in zip(self.bits, shown, strict=True):
            pair = eight_bits(pixels), thumbnail(images, bits)
            hit = torch.stack([self._classes(x, 5) == wanted for x in pair], dim=1)
            found.append((hit, pair))
        return found

    def _classes(self, images: Tensor, count: int) -> Tensor:
        classes = self.networks.classes(images, count)
        assert classes is not None
        return classes

    def result(self, seed: int) -> list[Length]:
        """Agreement at each length, over all images that were collected."""
        hits = torch.cat(self.found).double()
        rows = []
        for k, (tokens, bits) in enumerate(zip(self.lengths, self.bits, strict=True)):
            ours, theirs = (
                Agreement(
                    mean(hits[:, k, which, 0], seed=seed), mean(hits[:, k, which].sum(1), seed=seed)
                )
                for which in (0, 1)
            )
            rows.append(Length(tokens, bits, ours, theirs))
        return rows


def gallery(model: AdaptiveTokenizer, data: ImageSet, watcher: Watcher) -> Gallery:
    """Gallery of images, evenly spaced by name, at each length, thumbnails below; captions say if the class agrees."""
    chosen = spaced(len(data), SHOWN)
    images = data.levels[chosen].float() / 255
    hits = watcher.hits(images, reconstructions(model, images))
    rows: list[list[Tile]] = []
    for b, n in enumerate(chosen):
        name = data.names[n].rpartition("/")[2]
        pair = [Tile(name, images[b])], [Tile("thumbnails below")]
        for tokens, (hit, pixels) in zip(watcher.lengths, hits, strict=True):
            for row, which, color in ((pair[0], 0, BLUE), (pair[1], 1, ORANGE)):
                seen = "same class" if hit[b, which, 0] else "other class"
                row.append(Tile(f"{tokens}: {seen}", pixels[which][b], color))
        rows += pair
    return Gallery("What the classifier saw", rows, 2)
