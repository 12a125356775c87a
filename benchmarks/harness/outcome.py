"""Markdown tables of a folder of ``python -m benchmarks.harness.gpu``: outcomes of its parts, and tuned tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: Lines of a part's log that the page repeats: measurements printed by tests.
SAID = re.compile(r"^measured: .*", re.MULTILINE)


def table(columns: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown table of these column heads and rows; ``sides`` aligns each column left (l) or right (r)."""
    line = "|" + "".join("--:|" if side == "r" else "---|" for side in sides)
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (columns, *rows))
    return "\n".join([head, line, *lines])


def parts(folder: Path) -> str:
    """Table of the parts' outcomes, seconds and printed measurements; "" if the folder has no ``parts.json``."""
    file = folder / "parts.json"
    if not file.exists():
        return ""
    rows = []
    for name, part in json.loads(file.read_text()).items():
        log = folder / f"{name}.log"
        said = SAID.findall(log.read_text(errors="replace")) if log.exists() else []
        notes = [part.get("reason", ""), *(line.removeprefix("measured: ") for line in said)]
        cells = (name, part["outcome"], f"{part['seconds']} s", "; ".join(filter(None, notes)))
        rows.append(tuple(cell.replace("|", "/") for cell in cells))
    return table(("part", "outcome", "took", ""), "llrl", rows) + "\n"


def tiles(folder: Path) -> str:
    """Table of the present and the chosen tile of every tuned entry, with their times; "" if nothing was tuned."""
    rows = []
    for file in sorted(folder.glob("tiles-*.json")):
        op = file.stem.removeprefix("tiles-")
        for name, entry in json.loads(file.read_text()).items():
            times = {tuple(tile["tile"]): tile for tile in entry["tiles"]}
            present, chosen = (tuple(entry[key]) for key in ("present", "chosen"))
            rows.append(
                (
                    f"{op} {name}",
                    *(str(present), _time(times.get(present))),
                    *("" if chosen == present else str(chosen), _time(times.get(chosen))),
                    str(len(times)),
                )
            )
    columns = ("entry", "present tile", "takes", "better", "takes", "tried and right")
    return table(columns, "llrlrr", rows) + "\n" if rows else ""


def _time(tile: dict[str, Any] | None) -> str:
    """Median and spread of a tile's time, as text."""
    if tile is None:
        return "does not run"
    spread = tile["spread_us"]
    return f"{tile['us']:.1f} us" + ("" if spread is None else f" ± {spread:.1f}")
