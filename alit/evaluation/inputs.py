"""Images to evaluate: files, read by a protocol, or drawn ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import AdaptiveTokenizerConfig
from ..folders import Listing
from ..images import MAX_MEGAPIXELS, load_square, to_tensor, upright
from .simple import Drawing

PROTOCOLS = ("pinned", "official")


class Reading:
    """Single-use iterable over batches (B, 3, side, side) in [0, 1] of images of a model's size.

    Attributes:
        done: number of images so far.
        unreadable: a line for each file that was skipped.

    Raises:
        ValueError: an unknown protocol, a model whose images are not square, drawings of another size; at the end,
            that none of the files could be read.
    """

    def __init__(
        self,
        images: Sequence[Path] | Sequence[Drawing],
        config: AdaptiveTokenizerConfig,
        protocol: str,
        batch_size: int,
        max_megapixels: float,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        self.side, width = config.image_size
        if self.side != width:
            raise ValueError(f"image_size: expected a square, got {config.image_size}")
        self.drawn = [x for x in images if isinstance(x, Drawing)]
        for drawing in self.drawn:
            if drawing.pixels.shape != (3, self.side, self.side):
                expected = f"expected shape {(3, self.side, self.side)}"
                raise ValueError(f"images: {expected}, got {tuple(drawing.pixels.shape)}")
        self.listing = Listing([x for x in images if not isinstance(x, Drawing)])
        self.load = load_square if protocol == "pinned" else cropped
        self.batch_size, self.max_megapixels = batch_size, max_megapixels
        self.done = 0

    @property
    def unreadable(self) -> list[str]:
        return self.listing.unreadable

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches():
            self.done += len(batch)
            yield batch
        if self.done == 0:
            raise ValueError(f"data: none of {len(self.listing.images)} images can be read")

    def _batches(self) -> Iterator[Tensor]:
        size = self.batch_size
        for start in range(0, len(self.drawn), size):
            yield torch.stack([x.pixels for x in self.drawn[start : start + size]])

        def load(file: Path) -> Tensor:
            return self.load(file, self.side, max_megapixels=self.max_megapixels)

        for _, batch in self.listing.batches(load, size):
            yield batch


def cropped(file: Path, size: int, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """Center crop of an image, not resized: (3, size, size) in [0, 1].

    Raises:
        OSError: as :func:`alit.images.upright`, or a smaller image.
    """
    image = upright(file, max_megapixels=max_megapixels)
    width, height = image.size
    if min(width, height) < size:
        raise OSError(f"expected at least {size} x {size} pixels, got {width} x {height}")
    left, top = (width - size) // 2, (height - size) // 2
    return to_tensor(image.crop((left, top, left + size, top + size)))
