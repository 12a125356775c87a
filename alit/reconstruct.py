"""Photographs through the tokenizer and back: what ``alit reconstruct`` does."""

from __future__ import annotations

import itertools
import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import images
from .console import printable
from .criteria import Criterion, FixedLength
from .evaluation import thumbnail
from .evaluation.evaluate import bits_per_token, eight_bits
from .folders import Listing
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
    listing: Listing,
    output: Path,
    criterion: Criterion,
    *,
    beside: bool,
    console: Console,
    max_megapixels: float = images.MAX_MEGAPIXELS,
) -> None:
    """Write each picture's reconstruction to ``NAME.png`` in ``output`` and print a table of costs and errors.

    Args:
        listing: pictures, of which the centre is taken; of those that cannot be read it has a line afterwards, and the
            others are done all the same.
        beside: write original, reconstruction and thumbnail side by side instead of the reconstruction alone.

    Raises:
        OSError: no picture that can be read, a file that cannot be written.
        ValueError: a criterion that does not fit the model; a target that is one of the photographs.
    """
    listing.pictures = list(dict.fromkeys(listing.pictures))
    targets = _targets(listing.pictures, output)
    if isinstance(criterion, FixedLength):
        criterion.check(model, 1)
    output.mkdir(parents=True, exist_ok=True)
    table = Table("picture", box=None, pad_edge=False)
    for title in ("tokens", "bits", "L1 (thumbnail)", "PSNR, dB (thumbnail)"):
        table.add_column(title, justify="right")
    size = model.config.image_size
    readable = listing.loaded(lambda path: images.load(path, size, max_megapixels=max_megapixels))
    with console.status(f"reconstructing {len(targets)} pictures"):
        while batch := dict(itertools.islice(readable, BATCH)):
            results = reconstruct(model, torch.stack(list(batch.values())), criterion)
            for path, result in zip(batch, results, strict=True):
                shown = (result.original, result.pixels, result.thumbnail)
                picture = torch.cat(shown, dim=2) if beside else result.pixels
                images.save_image(images.to_image(picture), targets[path])
                name = Text(printable(targets[path].name))  # no markup in it
                table.add_row(name, *_row(result))
    if not table.row_count:
        raise OSError(listing.skipped())
    console.print(table)
    console.out(f"{printable(output)}: {table.row_count} pictures")


def _row(result: Reconstruction) -> tuple[str, ...]:
    ours, theirs = result.pixels, result.thumbnail
    return (
        str(result.tokens),
        f"{result.bits:.0f}",
        f"{l1(result.original, ours):.3f} ({l1(result.original, theirs):.3f})",
        f"{psnr(result.original, ours):.1f} ({psnr(result.original, theirs):.1f})",
    )


def _targets(paths: list[Path], output: Path) -> dict[Path, Path]:
    """A PNG file for each picture; pictures of one name get numbers.

    Names that differ in case, or in how Unicode composes them, are one: some file systems hold them so.
    """
    targets: dict[Path, Path] = {}
    taken: dict[str, int] = {}  # the last number tried
    for path in paths:
        name, stem = path.stem, _folded(path.stem)
        while _folded(name) in taken:
            taken[stem] += 1
            name = f"{path.stem}-{taken[stem]}"
        taken[_folded(name)] = 1
        targets[path] = output / f"{name}.png"
    sources = {_identity(path) for path in paths} - {None}
    for target in targets.values():
        if _identity(target) in sources:
            raise ValueError(
                f"output: {printable(target)} is one of the photographs; choose another folder"
            )
    return targets


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file, whatever its name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
