"""``alit info``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..alit_format import Reader
from ..atomic_files import reading
from ..console import console, counted, printable
from ..image_records import ImageInfo
from . import options

#: Most rows of the table of lengths, and of that of images.
ROWS, IMAGES = 8, 32


def info(
    source: Annotated[Path, typer.Argument(help="The .alit file.")],
    as_json: options.Json = False,
) -> None:
    """Show what an .alit file holds: images, bits per pixel, lengths, names and sizes. Needs no model.

    The whole file is checked first:

        alit info holiday.alit

    A damaged one is refused, with what is wrong in it. For other programs, all of it as JSON:

        alit info holiday.alit --json

    There sizes are heights and widths.
    """
    console.speak(as_json=as_json)
    with reading(source) as file, options.naming(source):
        tokens = Reader(file)
        if as_json:
            console.result(described(tokens))
            return
        count = min(IMAGES, tokens.image_count)
        images, lengths = tokens.images(0, count), tokens.lengths(0, count)
    identity, (height, width) = tokens.identity, tokens.identity.image_size
    console.out(f"{printable(source)}: {summary(tokens)}")
    console.print(
        f"written by model {identity.fingerprint.hex()[:12]}, {identity.codebook_size} codes of {identity.bits} bits, "
        f"images of {width}x{height}; version {tokens.version} of the format"
    )
    if tokens.image_count:
        table = Table("tokens", "images", "", title="lengths")
        rows = histogram(tokens.histogram)
        most = max(rows.values())
        for name, count in rows.items():
            table.add_row(name, str(count), "#" * (max(1, 40 * count // most) if count else 0))
        console.print(table)
    if tokens.image_count and tokens.version > 1:
        console.print(_shown(images, lengths.tolist(), tokens.image_count))


def histogram(lengths: dict[int, int]) -> dict[str, int]:
    """Number of images by length; more than ``ROWS`` lengths are grouped into ranges."""
    if len(lengths) <= ROWS:
        return {str(length): count for length, count in sorted(lengths.items())}
    low, high = min(lengths), max(lengths)
    width = math.ceil((high + 1 - low) / ROWS)
    counts = dict.fromkeys(range(low, high + 1, width), 0)
    for length, count in lengths.items():
        counts[length - (length - low) % width] += count
    return {f"{x}-{min(x + width - 1, high)}": count for x, count in counts.items()}


def described(tokens: Reader) -> dict[str, Any]:
    """Content of the tables for JSON, of all images; sizes are (height, width), null if the file has none."""
    identity, count = tokens.identity, tokens.image_count
    images, lengths = tokens.images(0, count), tokens.lengths(0, count).tolist()
    each = zip(
        images.names,
        images.originals.tolist(),
        images.sizes.tolist(),
        lengths,
        strict=True,
    )
    return {
        "version": tokens.version,
        "model": identity.fingerprint.hex(),
        "codebook_size": identity.codebook_size,
        "bits_per_token": identity.bits,
        "image_size": list(identity.image_size),
        "images": count,
        "tokens": tokens.token_count,
        "tokens_per_image": tokens.token_count / count if count else None,
        "bytes": tokens.size,
        "bits_per_pixel": 8 * tokens.size / tokens.pixels if count else None,
        "lengths": {str(length): number for length, number in tokens.histogram.items()},
        "each": [
            {
                "name": name or None,
                "original": original if any(original) else None,
                "encoded": encoded,
                "tokens": length,
            }
            for name, original, encoded, length in each
        ],
    }


def _shown(images: ImageInfo, lengths: list[int], count: int) -> Table:
    """Table of names and sizes of the first of ``count`` images."""
    table = Table("name", "original", "encoded", "tokens", title="images")
    rows = zip(images.names, images.originals, images.sizes, lengths, strict=True)
    for name, (height, width), (rows_encoded, columns), length in rows:
        original = f"{width}x{height}" if height else "unknown"
        table.add_row(Text(printable(name)), original, f"{columns}x{rows_encoded}", str(length))
    if (more := count - len(lengths)) > 0:
        table.add_row("...", "", "", f"{counted(more, 'image')} more")
    return table


def summary(tokens: Reader) -> str:
    """Summary of a file in one line: images, tokens, bytes, bits per pixel."""
    count = tokens.image_count
    if not count:
        return f"no images, {tokens.size} bytes"
    return (
        f"{counted(count, 'image')}, {tokens.token_count} tokens "
        f"({tokens.token_count / count:.1f} an image), "
        f"{tokens.size} bytes, {8 * tokens.size / tokens.pixels:.4f} bits per pixel"
    )
