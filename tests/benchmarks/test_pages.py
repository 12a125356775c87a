"""Pages of docs/ agree with the files of benchmarks/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install .[bench]")

from benchmarks.harness import pages
from benchmarks.harness.pages import MARKER, SECTIONS, current


@pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.name)
def test_a_page_is_current(path: Path) -> None:
    assert current(path) == path.read_text(), "run python -m benchmarks.harness.pages"


def test_every_section_stands_on_a_page() -> None:
    found = {name for path in pages.pages() for name in MARKER.findall(path.read_text())}
    assert found >= SECTIONS.keys()


def test_a_stale_page_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale section is replaced with links relative to its page; text around it and foreign sections stay."""
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(
        pages, "SECTIONS", {"new": lambda: "[a](../benchmarks/a.json) [b](../docs/b.md)"}
    )
    deep, alone = tmp_path / "kernels" / "page.md", tmp_path / "alone.md"
    deep.parent.mkdir()
    other = "<!-- other: begin -->\nkept\n<!-- other: end -->\n"
    deep.write_text(f"head\n<!-- new: begin -->\nold\n<!-- new: end -->\n{other}")
    alone.write_text(other)
    assert pages.pages() == [deep]
    pages.main()
    assert (tmp_path / "images" / "speed.svg").exists()
    links = "[a](../../benchmarks/a.json) [b](../b.md)"
    assert deep.read_text() == f"head\n<!-- new: begin -->\n{links}\n<!-- new: end -->\n{other}"
    deep.write_text("<!-- new: begin -->\nold")
    with pytest.raises(ValueError, match="markers"):
        current(deep)


def test_speed_has_every_case_of_the_files() -> None:
    """Each case with a contender beside ours is in one of the tables of speed."""
    groups = {
        group
        for run in pages.runs()
        for group, rows in run.groups.items()
        if "ours" in rows and any(not name.startswith("ours") for name in rows)
    }
    tables = "\n".join(SECTIONS[f"speed of {op}"]() for op in pages.CASES)
    shown = set(re.findall(r"^\| ([^|]+?) \|", tables, re.MULTILINE)) - {"case"}
    assert shown == {group for group in groups if "stage-1 step" not in group}
    assert "stage-1 step" in SECTIONS["training"]()
