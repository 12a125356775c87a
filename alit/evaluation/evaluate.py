"""Reconstruction quality of each length, beside the thumbnail's at as many bits.

Protocol "pinned": centre square, resized (bicubic) to the model's size; reconstructions clamped and rounded to 8 bits.
Protocol "official": centre crop without resizing, reconstructions clamped and truncated to 8 bits, as published.
Everywhere: means over all pictures, pixels in [0, 1], each picture counted once, in order of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import AdaptiveTokenizerConfig
from ..folders import Listing
from ..images import MAX_MEGAPIXELS, load_square, to_tensor, upright
from ..tokenizer import AdaptiveTokenizer
from .learned import Frechet, Networks
from .metrics import (
    bits_per_token,
    codebook_usage,
    eight_bits,
    l1,
    psnr,
    ssim,
    thumbnail,
    thumbnail_side,
)

PROTOCOLS = ("pinned", "official")
#: In the order in which they are measured; the last only where there is a network for it.
METRICS = ("l1", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Quality:
    """Means over pictures: ``l1`` (absolute pixel error), ``psnr`` (dB), ``ssim``, ``lpips``; pixels in [0, 1].

    ``rfid``: Frechet distance of Inception features. Both are None where there is no network for them.
    """

    l1: float
    psnr: float
    ssim: float
    lpips: float | None = None
    rfid: float | None = None


@dataclass(frozen=True)
class LengthQuality:
    """One length.

    Attributes:
        tokens, bits: per picture. Continuous tokens count 16 bits a channel.
        model: quality of the reconstructions.
        thumbnail: quality of a ``thumbnail_side`` squared picture with 4 bits a channel, enlarged.
        codes_used, perplexity: share of the codebook that occurs, and exp(entropy) of how often; None without codebook.
    """

    tokens: int
    bits: float
    model: Quality
    thumbnail: Quality
    thumbnail_side: int
    codes_used: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` returns. ``unreadable``: names of files that were skipped."""

    protocol: str
    pictures: int
    image_size: tuple[int, int]
    lengths: list[LengthQuality]
    unreadable: list[str]


@torch.no_grad()
def evaluate(
    model: AdaptiveTokenizer,
    files: list[Path],
    *,
    protocol: str = "pinned",
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    networks: Networks = Networks(),  # noqa: B008 (immutable)
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Quality of each length on pictures.

    Args:
        model: in evaluation mode, on its device; square pictures.
        networks: for LPIPS and rFID, see :func:`alit.evaluation.networks`; none leaves both out.
        on_batch: called with the number of pictures done.

    Raises:
        ValueError: an unknown protocol, none of the files readable, a model whose pictures are not square.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    config, listing, done = model.config, Listing(list(files)), 0
    side, width = config.image_size
    if side != width:
        raise ValueError(f"image_size: expected a square, got {config.image_size}")
    lengths = [_Length(i, config, networks.perceptual) for i in range(config.iterations)]
    frechet = None if networks.inception is None else Frechet(networks.inception)

    def load(file: Path) -> Tensor:
        read = load_square if protocol == "pinned" else cropped
        return read(file, side, max_megapixels=max_megapixels)

    for _, images in listing.batches(load, batch_size):
        shown: list[Tensor] = []
        rollout = model.rollout(images.to(model.latent_tokens.device))
        for iteration, length in zip(rollout, lengths, strict=True):
            assert iteration.prediction is not None
            pixels = model.pixels(iteration.prediction)
            ours = eight_bits(pixels, truncated=protocol == "official").cpu()
            theirs = thumbnail(images, length.bits)
            length.add(images, ours, theirs, iteration.bottleneck.index_BL)
            shown += [ours, theirs]
        if frechet is not None:
            frechet.add(images, shown)
        done += len(images)
        if on_batch is not None:
            on_batch(done)
    if done == 0:
        raise ValueError(f"data: none of {len(files)} pictures can be read")
    none: list[float | None] = [None] * (2 * len(lengths))
    rfid = none if frechet is None else frechet.distances()
    results = [x.result(rfid[2 * i : 2 * i + 2]) for i, x in enumerate(lengths)]
    return Evaluation(protocol, done, config.image_size, results, listing.unreadable)


class _Length:
    """What is measured at one length: the model's pictures and thumbnails, each by the fields of :class:`Quality`."""

    def __init__(
        self, iteration: int, config: AdaptiveTokenizerConfig, perceptual: nn.Module | None
    ) -> None:
        self.tokens, self.perceptual = config.latents_per_iteration * (iteration + 1), perceptual
        self.bits = self.tokens * bits_per_token(config)
        self.side = min(thumbnail_side(self.bits), *config.image_size)
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.counts = torch.zeros(config.codebook_size, dtype=torch.int64)

    def add(self, images: Tensor, ours: Tensor, theirs: Tensor, index_BL: Tensor | None) -> None:
        self.rows.append((self._qualities(images, ours), self._qualities(images, theirs)))
        if index_BL is not None:
            index = index_BL.flatten().cpu()
            self.counts += torch.bincount(index, minlength=len(self.counts))

    def _qualities(self, images: Tensor, shown: Tensor) -> Tensor:
        """(B, 3 or 4) float64"""
        values = [metric(images, shown).double() for metric in (l1, psnr, ssim)]
        if self.perceptual is not None:
            device = next(self.perceptual.parameters()).device
            values.append(self.perceptual(images.to(device), shown.to(device)).double().cpu())
        return torch.stack(values, dim=1)

    def result(self, rfid: Sequence[float | None]) -> LengthQuality:
        means = (torch.cat(x).mean(0).tolist() for x in zip(*self.rows, strict=True))
        ours, theirs = (
            Quality(**dict(zip(METRICS, x, strict=False)), rfid=distance)
            for x, distance in zip(means, rfid, strict=True)
        )
        usage = codebook_usage(self.counts) if self.counts.any() else (None, None)
        return LengthQuality(self.tokens, self.bits, ours, theirs, self.side, *usage)


def cropped(file: Path, size: int, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """The centre of a picture as it is. (3, size, size) in [0, 1]

    Raises:
        OSError: as :func:`alit.images.upright`, or a picture that is smaller.
    """
    picture = upright(file, max_megapixels=max_megapixels)
    width, height = picture.size
    if min(width, height) < size:
        raise OSError(f"expected at least {size} x {size} pixels, got {width} x {height}")
    left, top = (width - size) // 2, (height - size) // 2
    return to_tensor(picture.crop((left, top, left + size, top + size)))
