"""The notebook of docs: ten cells without outputs run in order. ``make docs`` runs it in Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    cells = [x for x in json.loads(TOUR.read_text())["cells"] if x["cell_type"] == "code"]
    assert len(cells) == 10
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [] and cell["execution_count"] is None  # no stale outputs
        exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), names)
    assert names["seen"].shape == (5, 3, 224, 320) and names["maps"].shape == (256, 7, 10)
    assert names["budget"].lengths.sum() <= 4 * 96
    matplotlib.pyplot.close("all")
