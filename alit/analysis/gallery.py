"""Images in rows with captions: drawn on one sheet, or laid out on the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..demo.sheet import Tile, sheet
from ..images import save_image


class Gallery(NamedTuple):
    """Titled rows of tiles, all of one length; every ``together`` rows form a group."""

    title: str
    rows: Sequence[Sequence[Tile]]
    together: int = 1

    def save(self, path: Path) -> None:
        """Write the gallery as one PNG file."""
        titles = [self.title, *[""] * (len(self.rows[0]) - 1)]
        save_image(sheet(titles, self.rows, together=self.together), path)
