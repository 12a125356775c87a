"""``alit reconstruct``."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import images
from ..console import console, counted, printable
from ..criteria import Criterion
from ..evaluation.metrics import bits_per_token, eight_bits, l1, psnr, thumbnail
from ..folders import Listing, find
from ..tokenizer import AdaptiveTokenizer
from . import options

#: Pictures together.
BATCH = 8


def reconstruct(
    photos: options.Photos,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "reconstructed"
    ),
    model: options.Model = "nano",
    max_l1: options.Threshold = None,
    tokens: options.Tokens = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside", help="Original, reconstruction and thumbnail side by side in each picture."
        ),
    ] = False,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = images.MAX_MEGAPIXELS,
    device: options.Device = "auto",
) -> None:
    """Show photographs as the tokenizer sees them: NAME.png in a folder, and a table of what each cost.

    The table has tokens, bits and errors of every picture (its centre square, at the model's size), and in brackets the
    errors of a thumbnail of as many bits, enlarged again: what a tokenizer has to beat.

        alit reconstruct photo.jpg

        alit reconstruct photo.jpg --tokens 64 --beside

        alit reconstruct holiday/ -o small --max-l1 0.06

    """
    loaded = options.load(model, device)
    criterion = options.criterion(loaded, max_l1=max_l1, tokens=tokens)
    listing = find(photos, recursive=recursive)
    listing.pictures = list(dict.fromkeys(listing.pictures))
    targets = targets_of(listing.pictures, output)
    output.mkdir(parents=True, exist_ok=True)
    table = Table("picture", box=None, pad_edge=False)
    for title in ("tokens", "bits", "L1 (thumbnail)", "PSNR, dB (thumbnail)"):
        table.add_column(title, justify="right")
    with console.status(f"reconstructing {counted(len(targets), 'picture')}"):
        _write(loaded, listing, criterion, targets, table, beside, max_megapixels)
    if not table.row_count:
        raise OSError(listing.skipped())
    console.print(table)
    console.out(f"{printable(output)}: {counted(table.row_count, 'picture')}")
    options.say_what_is_missing(listing)


def _write(
    model: AdaptiveTokenizer,
    listing: Listing,
    criterion: Criterion,
    targets: dict[Path, Path],
    table: Table,
    beside: bool,
    max_megapixels: float,
) -> None:
    """Write a picture for each that can be read, and add its row to the table."""

    def load(path: Path) -> Tensor:
        return images.load(path, model.config.image_size, max_megapixels=max_megapixels)

    for paths, originals in listing.batches(load, BATCH):
        tokens = model.encode(originals.to(model.latent_tokens.device), criterion)
        decoded = [eight_bits(pixels).cpu() for pixels in model.decode(tokens)]
        counts = tokens.lengths.tolist()
        for path, original, ours, count in zip(paths, originals, decoded, counts, strict=True):
            bits = count * bits_per_token(model.config)
            theirs = thumbnail(original[None], bits)[0]
            shown = torch.cat((original, ours, theirs), dim=2) if beside else ours
            images.save_image(images.to_image(shown), targets[path])
            table.add_row(
                Text(printable(targets[path].name)),  # no markup in it
                str(count),
                f"{bits:.0f}",
                f"{l1(original, ours):.3f} ({l1(original, theirs):.3f})",
                f"{psnr(original, ours):.1f} ({psnr(original, theirs):.1f})",
            )


def targets_of(paths: list[Path], output: Path) -> dict[Path, Path]:
    """A PNG file for each picture; pictures of one name get numbers.

    Names that differ in case, or in how Unicode composes them, are one: some file systems hold them so.

    Raises:
        ValueError: one of them is one of the pictures.
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
