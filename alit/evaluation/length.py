"""Measurements at one length: the model's images, thumbnails and files, image by image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import AdaptiveTokenizerConfig
from .image_files import FORMATS, Shown
from .learned import Networks
from .metrics import (
    bits_per_token,
    border_steps,
    codebook_usage,
    l1,
    psnr,
    ssim,
    thumbnail_side,
)
from .results import Blockiness, FileQuality, LengthQuality, Quality


class Batch(NamedTuple):
    """Batch of images, with what does not depend on the length.

    Attributes:
        images: (B, 3, side, side) in [0, 1].
        files: by format, for each image, at each length; formats that Pillow does not write are missing.
        classes: (B, 1) likeliest class of each image; None without a classifier.
    """

    images: Tensor
    files: dict[str, list[list[Shown | None]]]
    classes: Tensor | None


class Rows:
    """Accumulator of values of each image, by name."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add values (B,) by name, the same names in every call."""
        self.batches.append({name: x.double().cpu() for name, x in values.items()})

    def of(self, name: str) -> Tensor:
        """Values ``name`` of all images, (N,) float64."""
        return torch.cat([x[name] for x in self.batches])

    def means(self) -> dict[str, float]:
        return {name: float(self.of(name).mean()) for name in self.batches[0]}


class LengthMeasures:
    """Accumulator of measurements at one length of a model; its tokens, bits and bytes."""

    def __init__(self, iteration: int, config: AdaptiveTokenizerConfig, networks: Networks) -> None:
        self.iteration, self.networks = iteration, networks
        self.tokens = config.latents_per_iteration * (iteration + 1)
        self.bits = self.tokens * bits_per_token(config)
        self.bytes = math.ceil(self.bits / 8)
        self.side = min(thumbnail_side(self.bits), *config.image_size)
        self.ours, self.theirs, self.borders = Rows(), Rows(), Borders()
        self.files = {name: FileMeasures() for name in FORMATS}
        #: Codebooks whose codes are counted: one, or one for each iteration so far.
        codebooks = iteration + 1 if config.codebooks == "each" else 1
        self.counts = torch.zeros(codebooks, config.codebook_size, dtype=torch.int64)

    def add(self, batch: Batch, ours: Tensor, theirs: Tensor, index_BL: Tensor | None) -> None:
        """Add the model's images and the thumbnails, (B, 3, side, side) of 8 bits, and indices (B, L) of codes."""
        self.ours.add(self._qualities(batch, ours))
        self.theirs.add(self._qualities(batch, theirs))
        self.borders.add(ours)
        for name, files in batch.files.items():
            self.files[name].add(batch.images, [file[self.iteration] for file in files])
        if index_BL is not None:
            for count, part in zip(self.counts, index_BL.chunk(len(self.counts), 1), strict=True):
                count += torch.bincount(part.flatten(), minlength=len(count))

    def _qualities(self, batch: Batch, shown: Tensor) -> dict[str, Tensor]:
        values = _pixels(batch.images, shown)
        if (perceptual := self.networks.perceptual) is not None:
            device = next(perceptual.parameters()).device
            values["lpips"] = perceptual(batch.images.to(device), shown.to(device))
        if batch.classes is not None:
            first = self.networks.classes(shown, 5)
            assert first is not None
            hits = first == batch.classes
            values |= {"top1": hits[:, 0], "top5": hits.any(1)}
        return values

    def result(self, rfid: float | None, thumbnail_rfid: float | None) -> LengthQuality:
        ours, theirs = self.ours.of("l1"), self.theirs.of("l1")
        used, perplexity = codebook_usage(self.counts) if self.counts.any() else (None, None)
        return LengthQuality(
            tokens=self.tokens,
            bits=self.bits,
            model=Quality(**self.ours.means(), rfid=rfid),
            thumbnail=Quality(**self.theirs.means(), rfid=thumbnail_rfid),
            thumbnail_side=self.side,
            codes_used=used,
            perplexity=perplexity,
            loses=int((theirs < ours).sum()),
            webp=self.files["webp"].result(ours),
            avif=self.files["avif"].result(ours),
            blockiness=self.borders.result(),
        )


class FileMeasures:
    """Accumulator of the quality of files of one format at one length."""

    def __init__(self) -> None:
        self.rows, self.complete = Rows(), True

    def add(self, images: Tensor, files: list[Shown | None]) -> None:
        there = [file for file in files if file is not None]
        self.complete = self.complete and len(there) == len(files)
        if self.complete:
            values = _pixels(images, torch.stack([file.pixels for file in there]))
            values["bytes"] = torch.tensor([file.bytes for file in there])
            values["side"] = torch.tensor([file.side for file in there])
            self.rows.add(values)

    def result(self, ours: Tensor) -> FileQuality | None:
        """Quality of the files beside the model's L1 of each image, (N,); None if a file is missing."""
        if not (self.complete and self.rows.batches):
            return None
        means = self.rows.means()
        size, side = means.pop("bytes"), means.pop("side")
        wins = int((ours < self.rows.of("l1")).sum())
        return FileQuality(size, side, Quality(**means), wins)


class Borders:
    """Accumulator of the steps between neighboring pixels of images."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Add images (B, 3, height, width)."""
        self.steps.append(border_steps(images))

    def result(self) -> Blockiness:
        across_32, across_8, elsewhere = torch.cat(self.steps).mean(0).tolist()
        ratios = (x / elsewhere if elsewhere else math.nan for x in (across_32, across_8))
        return Blockiness(*(None if math.isnan(x) else x for x in ratios))


def _pixels(images: Tensor, shown: Tensor) -> dict[str, Tensor]:
    return {"l1": l1(images, shown), "psnr": psnr(images, shown), "ssim": ssim(images, shown)}
