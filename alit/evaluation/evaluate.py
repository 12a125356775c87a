"""Reconstruction quality of each length, beside the thumbnail's at as many bits.

Protocol "pinned": centre square, resized (bicubic) to the model's size; reconstructions clamped and rounded to 8 bits.
Protocol "official": centre crop without resizing, reconstructions clamped and truncated to 8 bits, as published.
Everywhere: means over all pictures, pixels in [0, 1], each picture counted once, in order of its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..console import printable
from ..folders import reason_of
from ..images import MAX_MEGAPIXELS, load_square, to_tensor, upright
from ..tokenizer import AdaptiveTokenizer
from .learned import Frechet, Networks
from .thumbnail import thumbnail, thumbnail_side

PROTOCOLS = ("pinned", "official")


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

    def asdict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


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
    config = model.config
    if config.image_size[0] != config.image_size[1]:
        raise ValueError(f"image_size: expected a square, got {config.image_size}")
    unreadable: list[str] = []
    sums = [_Sums(model, networks.perceptual) for _ in range(config.iterations)]
    frechet = None
    if networks.inception is not None:
        frechet = Frechet(networks.inception, 2 * config.iterations)
    device, done = model.latent_tokens.device, 0

    def load(file: Path) -> Tensor:
        read = load_square if protocol == "pinned" else _cropped
        return read(file, config.image_size[0], max_megapixels=max_megapixels)

    for images in _batches(files, load, batch_size, unreadable):
        shown: list[Tensor] = []
        for iteration, total in zip(model.rollout(images.to(device)), sums, strict=True):
            assert iteration.prediction is not None
            pixels = model.base_tokenizer.pixels(iteration.prediction.code_BNC, config.grid)
            quantized = iteration.bottleneck.quantized
            index = None if quantized is None else quantized.index
            ours = eight_bits(pixels, protocol).cpu()
            shown += [ours, total.add(images, ours, iteration.num_tokens, index)]
        if frechet is not None:
            frechet.add(images, shown)
        done += len(images)
        if on_batch is not None:
            on_batch(done)
    if done == 0:
        raise ValueError(f"data: none of {len(files)} pictures can be read")
    rfid: list[float | None] = [None] * (2 * config.iterations)
    if frechet is not None and done > 1:  # a distance of distributions
        rfid = list(frechet.distances())
    lengths = [total.result(done, rfid[2 * i], rfid[2 * i + 1]) for i, total in enumerate(sums)]
    return Evaluation(protocol, done, config.image_size, lengths, unreadable)


def eight_bits(pixels: Tensor, protocol: str) -> Tensor:
    """Clamped to [0, 1] and reduced to 8 bits, as the protocol has it."""
    levels = pixels.float().clamp(0, 1) * 255
    return (levels.floor() if protocol == "official" else levels.round()) / 255


def bits_per_token(model: AdaptiveTokenizer) -> float:
    config = model.config
    if config.bottleneck == "quantized":
        return math.log2(config.codebook_size)
    return 16.0 * (config.encoder.width if config.bottleneck == "unfactorized" else config.code_dim)


class _Sums:
    """Sums over pictures at one length."""

    def __init__(self, model: AdaptiveTokenizer, perceptual: nn.Module | None) -> None:
        self.perceptual = perceptual
        self.bits_per_token, self.size = bits_per_token(model), model.config.image_size
        self.model, self.thumbnail = np.zeros(4), np.zeros(4)
        self.tokens, self.count = 0, None
        self.codes = model.config.codebook_size
        self.used: Tensor | None = None

    def add(self, images: Tensor, pixels: Tensor, tokens: int, index: Tensor | None) -> Tensor:
        """Returns the thumbnails, enlarged."""
        self.tokens = tokens
        small = eight_bits(thumbnail(images, tokens * self.bits_per_token), "pinned")
        for which, those in ((self.model, pixels), (self.thumbnail, small)):
            for picture, other in zip(images, those, strict=True):
                which[:3] += _quality(picture, other)
            if self.perceptual is not None:
                on = next(self.perceptual.parameters()).device
                which[3] += float(self.perceptual(images.to(on), those.to(on)).sum())
        if index is not None:
            used = torch.bincount(index.flatten(), minlength=self.codes).double()
            self.used = used if self.used is None else self.used + used
        return small

    def result(
        self, pictures: int, rfid: float | None, thumbnail_rfid: float | None
    ) -> LengthQuality:
        bits = self.tokens * self.bits_per_token
        fraction = perplexity = None
        if self.used is not None:
            fraction = float((self.used > 0).double().mean())
            perplexity = float(torch.special.entr(self.used / self.used.sum()).sum().exp())
        ours, theirs = (
            self._means(sums / pictures, distance)
            for sums, distance in ((self.model, rfid), (self.thumbnail, thumbnail_rfid))
        )
        return LengthQuality(
            *(self.tokens, bits, ours, theirs, min(thumbnail_side(bits), *self.size)),
            *(fraction, perplexity),
        )

    def _means(self, means: NDArray[np.float64], rfid: float | None) -> Quality:
        l1, psnr, ssim, lpips = means.tolist()
        return Quality(l1, psnr, ssim, None if self.perceptual is None else lpips, rfid)


def _quality(picture: Tensor, other: Tensor) -> tuple[float, float, float]:
    """L1, PSNR and SSIM (scikit-image: 7x7 uniform window, mean over channels) of two (3, height, width)."""
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise ValueError("evaluation needs scikit-image: pip install 'alit[eval]'") from error
    difference = picture - other
    squared = max(float(difference.double().square().mean()), 1e-10)  # identical pictures: 100 dB
    planes = (x.permute(1, 2, 0).numpy() for x in (picture, other))
    ssim = structural_similarity(*planes, channel_axis=2, data_range=1.0)
    return float(difference.abs().mean()), -10 * math.log10(squared), float(ssim)


def _batches(
    files: list[Path], load: Callable[[Path], Tensor], batch_size: int, unreadable: list[str]
) -> Iterator[Tensor]:
    kept: list[Tensor] = []
    for file in files:
        try:
            kept.append(load(file))
        except (OSError, ValueError) as error:
            unreadable.append(f"{printable(file)}: {reason_of(file, error)}")
        if len(kept) == batch_size:
            yield torch.stack(kept)
            kept = []
    if kept:
        yield torch.stack(kept)


def _cropped(file: Path, size: int, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    picture = upright(file, max_megapixels=max_megapixels)
    width, height = picture.size
    if min(width, height) < size:
        raise ValueError(f"expected at least {size} x {size} pixels, got {width} x {height}")
    left, top = (width - size) // 2, (height - size) // 2
    return to_tensor(picture.crop((left, top, left + size, top + size)))
