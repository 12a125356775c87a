"""Images in rows, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..images import to_image
from ..plots import INK

TILE, GAP, LINE = 176, 4, 22


class Tile(NamedTuple):
    """An image (3, height, width) in [0, 1] with a caption below, or the caption alone."""

    caption: str
    pixels: Tensor | None = None
    color: str = INK


def sheet(titles: Sequence[str], rows: Sequence[Sequence[Tile]], *, together: int) -> Image.Image:
    """Sheet of tiles on white, a title above each column; every ``together`` rows form a group."""
    lines = 1 + max(title.count("\n") for title in titles)
    top = lines * LINE + GAP
    tops = [top + y * (TILE + LINE + GAP) + y // together * 2 * GAP for y in range(len(rows))]
    size = len(titles) * (TILE + GAP) + GAP, tops[-1] + TILE + LINE + GAP
    whole, font = Image.new("RGB", size, "white"), ImageFont.load_default(15)
    draw = ImageDraw.Draw(whole)
    for x, title in enumerate(titles):
        place = GAP + x * (TILE + GAP), 2
        draw.multiline_text(place, title, fill=INK, font=font, stroke_width=0.3)
    for y, row in zip(tops, rows, strict=True):
        for x, tile in enumerate(row):
            left, below = GAP + x * (TILE + GAP), y
            if tile.pixels is not None:
                image = to_image(tile.pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
                whole.paste(image, (left, y))
                below = y + TILE + 1
            draw.multiline_text((left, below), tile.caption, fill=tile.color, font=font)
    return whole
