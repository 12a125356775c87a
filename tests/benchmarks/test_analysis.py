"""benchmarks.studies.analysis: its results and the table on its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from alit.images import save_image, to_image
from benchmarks.studies import analysis
from tests.helpers.models import model


def test_results_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of two models, run one after the other, are on the page; segments are the halves of an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(analysis, "PAGE", tmp_path / "page.md")
    Path("page.md").write_text("before\n<!-- analysis: begin -->\n<!-- analysis: end -->\nafter\n")
    for folder in ("objects", "scenes", "segments"):
        Path(folder).mkdir()
    halves = torch.zeros(3, 16, 24)
    halves[:, :, 12:] = 1
    for i in range(4):
        pixels = torch.rand(3, 16, 24) * (i + 1) / 4
        for folder, shown in (("objects", pixels), ("scenes", pixels), ("segments", halves)):
            save_image(to_image(shown), Path(folder, f"{i}.png"))
    Path("objects/scores.csv").write_text(
        "file,complexity\n" + "".join(f"{i}.png,{i}\n" for i in range(4))
    )
    for seed, name in enumerate(("one", "two")):
        model(seed=seed).save_pretrained(tmp_path / "m.safetensors")
        options = "--objects objects --scenes scenes --segments segments"
        monkeypatch.setattr(sys, "argv", ["", "m.safetensors", name, *options.split()])
        analysis.main()
    found = json.loads(Path("results/one.json").read_text())
    assert found["command"] == f"python -m benchmarks.studies.analysis m.safetensors one {options}"
    assert found["machine"]["cpu"]
    results = found["results"]
    assert results["model"] == model(seed=0).identity().fingerprint.hex()
    assert results["objects"]["images"] == 4 == results["scenes"]["images"]
    assert results["scenes"]["segments"] == 8 and results["scenes"]["grid"] == [4, 6]
    most = results["scenes"]["maps"][-1]
    assert most["of"] == "the most on this grid" and most["oracle"] == [1, 1, 1]
    page = Path("page.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert "| scores with | one | two |\n" in page
    assert "| the most on this grid | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) |" in page


def test_the_page_says_what_the_files_hold() -> None:
    found = analysis.read(analysis.FOLDER)
    assert {"nano", "nano-e685ffb"} <= found.keys()
    assert analysis.tables(found) in analysis.PAGE.read_text()
