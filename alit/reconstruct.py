"""Photographs through the tokenizer and back: what ``alit reconstruct`` does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import images
from .criteria import Criterion, FixedLength
from .evaluation import thumbnail
from .evaluation.evaluate import bits_per_token, eight_bits
from .tokenizer import AdaptiveTokenizer

#: Pictures together.
BATCH = 8


@dataclass(frozen=True)
class Reconstruction:
    """One picture: what it costs, what it looks like, and the ``thumbnail`` of as many bits.

    Attributes:
        tokens, bits: their number. Continuous tokens count 16 bits a channel.
        original, pixels, thumbnail: (3, height, width) in [0, 1] on the CPU, reconstructions in 8 bits.
    """

    tokens: int
    bits: float
    original: Tensor
    pixels: Tensor
    thumbnail: Tensor


def reconstruct(
    model: AdaptiveTokenizer, originals: Tensor, criterion: Criterion
) -> list[Reconstruction]:
    """Encode and decode (B, 3, height, width) in [0, 1]; arguments and errors as :meth:`AdaptiveTokenizer.encode`."""
    tokens = model.encode(originals.to(model.latent_tokens.device), criterion)
    decoded = eight_bits(model.decode(tokens), "pinned").cpu()
    results = []
    for original, pixels, count in zip(originals, decoded, tokens.lengths.tolist(), strict=True):
        bits = count * bits_per_token(model)
        small = eight_bits(thumbnail(original[None], bits)[0], "pinned")
        results.append(Reconstruction(count, bits, original, pixels, small))
    return results


def l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of pixels in [0, 1]."""
    return float((a - b).abs().mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels; at most 100, for equal pictures."""
    return -10 * math.log10(max(float((a - b).double().square().mean()), 1e-10))


def run(
    model: AdaptiveTokenizer,
    photos: list[Path],
    output: Path,
    criterion: Criterion,
    *,
    beside: bool,
    console: Console,
) -> list[str]:
    """Write each picture's reconstruction to ``NAME.png`` in ``output`` and print a table of costs and errors.

    Args:
        photos: files, and folders of pictures; centre crops of them.
        beside: write original, reconstruction and thumbnail side by side instead of the reconstruction alone.

    Returns:
        A line for every file that is no readable picture; the others are done all the same.

    Raises:
        OSError: no such file, no picture in a folder, a file that cannot be written.
        ValueError: a criterion that does not fit the model; a target that is one of the photographs.
    """
    paths = list(dict.fromkeys(images.find(photos)))
    targets = _targets(paths, output)
    if isinstance(criterion, FixedLength):
        criterion.check(model, 1)
    output.mkdir(parents=True, exist_ok=True)
    table = Table("picture", box=None, pad_edge=False)
    for title in ("tokens", "bits", "L1 (thumbnail)", "PSNR, dB (thumbnail)"):
        table.add_column(title, justify="right")
    unreadable: list[str] = []
    with console.status(f"reconstructing {len(paths)} pictures"):
        for batch in _batches(paths, model.config.image_size, unreadable):
            results = reconstruct(model, torch.stack(list(batch.values())), criterion)
            for path, result in zip(batch, results, strict=True):
                shown = (result.original, result.pixels, result.thumbnail)
                picture = torch.cat(shown, dim=2) if beside else result.pixels
                images.save_image(images.to_image(picture), targets[path])
                name = Text(targets[path].name.replace("\n", "?"))  # no markup in it
                table.add_row(name, *_row(result))
    if table.row_count:
        console.print(table)
        console.out(f"{output}: {table.row_count} pictures")
    return unreadable


def _row(result: Reconstruction) -> tuple[str, ...]:
    ours, theirs = result.pixels, result.thumbnail
    return (
        str(result.tokens),
        f"{result.bits:.0f}",
        f"{l1(result.original, ours):.3f} ({l1(result.original, theirs):.3f})",
        f"{psnr(result.original, ours):.1f} ({psnr(result.original, theirs):.1f})",
    )


def _targets(paths: list[Path], output: Path) -> dict[Path, Path]:
    """A PNG file for each picture; pictures of one name get numbers."""
    targets: dict[Path, Path] = {}
    for path in paths:
        target, number = output / f"{path.stem}.png", 1
        while target in targets.values():
            number += 1
            target = output / f"{path.stem}-{number}.png"
        targets[path] = target
    sources = {path.resolve() for path in paths}
    for target in targets.values():
        if target.resolve() in sources:
            raise ValueError(f"output: {target} is one of the photographs; choose another folder")
    return targets


def _batches(
    paths: list[Path], size: tuple[int, int], unreadable: list[str]
) -> Iterator[dict[Path, Tensor]]:
    batch: dict[Path, Tensor] = {}
    for path in paths:
        try:
            batch[path] = images.load(path, size)
        except OSError as error:
            unreadable.append(f"{path}: not a readable picture ({error})")
        if len(batch) == BATCH:
            yield batch
            batch = {}
    if batch:
        yield batch
