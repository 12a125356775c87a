"""``alit info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..alit_format import Reader
from ..atomic_files import reading
from ..console import console, printable

#: Lengths in the table.
ROWS = 256


def info(source: Annotated[Path, typer.Argument(help="The .alit file.")]) -> None:
    """Show what an .alit file holds: images, bits per pixel, histogram of lengths. Needs no model.

    The whole file is checked first:

        alit info holiday.alit

    A damaged one is refused, with what is wrong in it.
    """
    with reading(source) as file:
        tokens = Reader(file)
    identity, (height, width) = tokens.identity, tokens.identity.image_size
    console.out(f"{printable(source)}: {summary(tokens)}")
    console.print(
        f"written by model {identity.fingerprint.hex()[:12]}, {identity.codebook_size} codes of {identity.bits} bits, "
        f"pictures of {width}x{height}"
    )
    if tokens.image_count:
        table = Table("tokens", "images", "", title="lengths")
        most = max(tokens.histogram.values())
        for length, count in list(tokens.histogram.items())[:ROWS]:
            table.add_row(str(length), str(count), "#" * max(1, 40 * count // most))
        if (more := len(tokens.histogram) - ROWS) > 0:
            table.add_row("...", "", f"{more} lengths more")
        console.print(table)


def summary(tokens: Reader) -> str:
    """What a file holds, in a line."""
    count, (height, width) = tokens.image_count, tokens.identity.image_size
    if not count:
        return f"no images, {tokens.size} bytes"
    return (
        f"{count} images, {tokens.token_count} tokens "
        f"({tokens.token_count / count:.1f} an image), "
        f"{tokens.size} bytes, {8 * tokens.size / (count * height * width):.4f} bits per pixel"
    )
