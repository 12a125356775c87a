"""``alit reconstruct``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.table import Table
from rich.text import Text

from .. import images
from ..console import console, counted, printable, report
from ..criterion import Criterion
from ..evaluation.metrics import bits_per_token, eight_bits, l1, psnr, thumbnail
from ..fitting import Fitted, without_padding
from ..folders import Listing, distinct, find
from ..tokenizer import AdaptiveTokenizer
from . import options

#: Images encoded and decoded together.
BATCH = 8


def reconstruct(
    photos: options.Photos,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the images; files of their names are replaced."
        ),
    ] = Path("reconstructed"),
    model: options.Model = "nano",
    relative_l1: options.RelativeThreshold = None,
    max_l1: options.Threshold = None,
    min_ssim: options.SSIMThreshold = None,
    code_error: options.CodeThreshold = None,
    tokens: options.Tokens = None,
    fit: options.Fit = "whole",
    predict: options.Predict = False,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside", help="Original, reconstruction and thumbnail side by side in each file."
        ),
    ] = False,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = images.MAX_MEGAPIXELS,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show photographs as the tokenizer sees them: NAME.png in a folder, and a table of what each cost.

    Each is as large as it was encoded. The table has tokens, bits and errors of every image at that size, and in
    brackets the errors of a thumbnail of as many bits, enlarged again: what a tokenizer has to beat.

        alit reconstruct photo.jpg

        alit reconstruct photo.jpg --tokens 64 --beside

        alit reconstruct holiday/ -o small --max-l1 0.06

    """
    console.speak(quiet=quiet, as_json=as_json)
    loaded = options.load(model, device)
    limits: dict[str, float | None] = {
        "relative_l1": relative_l1,
        "max_l1": max_l1,
        "min_ssim": min_ssim,
    }
    limits |= {"code_error": code_error, "tokens": tokens}
    criterion = options.criterion(loaded, predict=predict, **limits)
    load = options.loader(loaded, fit, max_megapixels)
    listing = find(photos, recursive=recursive)
    listing.images = list(dict.fromkeys(listing.images))
    targets = targets_of(listing.images, output)
    output.mkdir(parents=True, exist_ok=True)
    rows = _write(loaded, listing, criterion, targets, beside, load)
    if not rows:
        raise OSError(listing.skipped())
    console.result(
        {
            "folder": str(output),
            "images": [row._asdict() for row in rows],
            "skipped": listing.names_skipped(),
        },
        _table(rows),
        f"{printable(output)}: {counted(len(rows), 'image')}",
    )
    options.say_what_is_missing(listing)


class Row(NamedTuple):
    """Result of an image. Errors of the thumbnail are those of one with as many bits, enlarged again."""

    image: str
    file: str
    tokens: int
    bits: float
    l1: float
    thumbnail_l1: float
    psnr: float
    thumbnail_psnr: float


def _table(rows: list[Row]) -> Table:
    table = Table("image", box=None, pad_edge=False)
    for title in ("tokens", "bits", "L1 (thumbnail)", "PSNR, dB (thumbnail)"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            Text(printable(Path(row.file).name)),  # no markup in it
            str(row.tokens),
            f"{row.bits:.0f}",
            f"{row.l1:.3f} ({row.thumbnail_l1:.3f})",
            f"{row.psnr:.1f} ({row.thumbnail_psnr:.1f})",
        )
    return table


def _write(
    model: AdaptiveTokenizer,
    listing: Listing,
    criterion: Criterion,
    targets: dict[Path, Path],
    beside: bool,
    load: Callable[[Path], Fitted],
) -> list[Row]:
    """Write the reconstruction of each image that can be read; returns their results."""
    readable, rows = listing.loaded(load), list[Row]()
    report("reconstructing", 0, listing.readable, "images")
    while batch := list(itertools.islice(readable, BATCH)):
        given = [fitted.image.to(model.latent_tokens.device) for _, fitted in batch]
        tokens = model.encode(given, criterion)
        decoded, counts = model.decode(tokens), tokens.lengths.tolist()
        for (path, fitted), pixels, count in zip(batch, decoded, counts, strict=True):
            original = without_padding(fitted.image, fitted.padding)
            ours = without_padding(eight_bits(pixels).cpu(), fitted.padding)
            bits = count * bits_per_token(model.config)
            theirs = thumbnail(original[None], bits)[0]
            shown = torch.cat((original, ours, theirs), dim=2) if beside else ours
            images.save_image(images.to_image(shown), targets[path])
            errors = [float(f(original, x)) for f in (l1, psnr) for x in (ours, theirs)]
            rows.append(Row(str(path), str(targets[path]), count, bits, *errors))
            report("reconstructing", len(rows), listing.readable, "images")
    return rows


def targets_of(paths: list[Path], output: Path) -> dict[Path, Path]:
    """Path of a PNG file for each image; equal names get numbers, see :func:`alit.folders.distinct`.

    Raises:
        ValueError: one of these files is one of the images.
    """
    stems = distinct(path.stem for path in paths)
    targets = {path: output / f"{stem}.png" for path, stem in zip(paths, stems, strict=True)}
    sources = {_identity(path) for path in paths} - {None}
    for target in targets.values():
        if _identity(target) in sources:
            raise ValueError(
                f"output: {printable(target)} is one of the photographs; choose another folder"
            )
    return targets


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, whatever its name; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
