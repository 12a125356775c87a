"""The report: what it says of a run, files that are none, parts of a run, the README's section."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="pip install .[bench]")

from benchmarks.harness import report
from benchmarks.harness.report import BEGIN, END, replace_section, write
from benchmarks.harness.runs import Run, files, merged, read
from benchmarks.harness.timing import RESULTS

MACHINE = {
    "cpu": "some CPU", "gpu": None, "threads": 2, "torch": "2.13.0", "date": "2026-01-02",
    "ceilings": {"copy_gigabytes": 10.0, "matmul_gigaflops": 100.0},
}  # fmt: skip
PARTS = {"base": 0.1, "encoder": 0.2, "decoder": 0.1, "attention": 0.3, "quantizer": 0.1}
PARTS |= {"optimiser": 0.1, "rest": 0.1}


def entry(group: str, contender: str, median: float, **more: Any) -> dict[str, Any]:
    info = {
        "contender": contender, "flops": 10**9, "bytes": 10**8, "peak_megabytes": 12.0,
        "other_load_percent": 0.0,
    }  # fmt: skip
    times = [2 * median, median / 2, median]
    return {"group": group, "extra_info": info | more, "stats": {"data": times, "ops": 1.0}}


def result(path: Path, entries: list[dict[str, Any]], **machine: Any) -> Path:
    content: dict[str, Any] = {"machine_info": {"alit": MACHINE | machine}, "benchmarks": entries}
    content["commit_info"] = {"id": "0123456789", "dirty": True}
    content["left_out"] = {
        "op 8": {"loser": "wrong: off by |1|"},
        "op 9": {"loser": "wrong: off by |1|"},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    step = {"parts": PARTS, "parts_other_load_percent": 0.0, "images": 2, "state_megabytes": 100.0}
    entries = [
        entry("op 8", "ours", 0.1, tokens=8),
        entry("op 8", "peer", 0.05, tokens=8),
        entry("op 16", "ours", 0.2, tokens=16),
        entry("op 16", "peer", 0.3, tokens=16, other_load_percent=50.0, clock="events"),
        entry("step", "ours", 0.5, **step),
        entry("step", "eager baseline", 1.0, **{**step, "peak_megabytes": 24.0}),
    ]
    return read(result(tmp_path / "cpu.json", entries))


def test_report(run: Run, tmp_path: Path) -> None:
    section = write([run], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "some CPU, 2 threads; torch 2.13.0; 2026-01-02; commit 0123456 with changes" in text
    assert "| loser | wrong: off by /1/ | op 8; op 9 |" in text
    assert "| op 8 | peer | 50 ms | 25 to 100 | 0.50 |" in text, "a loss is shown"
    assert r"| op 16 | peer | 300 ms \* † |" in text, "a busy machine, launches in the time"
    assert r"\*: other processes" in text and "†: with the host's launches" in text
    assert "| step | ours | 4 | 2.00 | 2% | 12 (0.50) | 112 (0.90) | base 0.1," in text
    for plot in ("ratios", "roofline", "tokens", "breakdown"):
        assert f"(cpu-{plot}.svg)" in text
        assert "<svg" in (tmp_path / "out" / f"cpu-{plot}.svg").read_text()
    assert "| op 8 | 0.50 peer |" in section and r"| op 16 | 1.50 \* † peer |" in section


def test_the_same_results_give_the_same_files(run: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write([run], tmp_path / folder)
    files = sorted(x.name for x in (tmp_path / "a").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "change", [{"parts_other_load_percent": 40.0}, {"parts": {**PARTS, "rest": 2.0}}]
)
def test_breakdown_of_a_disturbed_step_is_left_out(
    change: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    busy = [row._replace(info=row.info | change) for row in run.rows]
    write([Run("busy", run.machine, busy)], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| step | ours | 4 | 2.00 |" in text and "breakdown" not in text and "base 0.1" not in text
    )


def test_some_rows_of_a_run(run: Run, tmp_path: Path) -> None:
    """A step without the eager one; two runs beside each other; nothing to compare, and few plots."""

    def written(*runs: Run) -> str:
        return write(list(runs), tmp_path) + (tmp_path / "README.md").read_text()

    step, op, ours = (
        Run(name, run.machine, [row for row in run.rows if chosen(row)])
        for name, chosen in (
            ("step", lambda row: (row.group, row.contender) == ("step", "ours")),
            ("gpu", lambda row: row.group == "op 8"),
            ("ours", lambda row: (row.group, row.contender) == ("op 8", "ours")),
        )
    )
    assert "| step | ours | 4 |  | 2% | 12 | 112 | base 0.1," in written(step)
    both = written(run, op)
    assert "| case | cpu | gpu |" in both and "| op 8 | 0.50 peer | 0.50 peer |" in both
    assert "| step | 2.00 eager baseline |  |" in both
    assert "†" not in written(ours), "no mark, no legend"
    assert [p.name for p in tmp_path.glob("ours-*.svg")] == ["ours-roofline.svg"]


def test_parts_of_a_run(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    better = {"copy_gigabytes": 11.0, "matmul_gigaflops": 90.0}
    result(folder / "test_a.json", [entry("a", "ours", 1.0)], ceilings=better, date="2026-01-03")
    result(folder / "test_b.json", [entry("b", "ours", 1.0)])
    result(folder / "ceilings.json", [entry("c", "ours", 1.0)])
    whole = read(folder)
    assert whole.name == "machine" and [row.group for row in whole.rows] == ["a", "b"]
    assert whole.machine["ceilings"] == {"copy_gigabytes": 11.0, "matmul_gigaflops": 100.0}
    assert whole.machine["date"] == "2026-01-03"
    elsewhere = read(result(tmp_path / "c.json", [], cpu="another"))
    with pytest.raises(ValueError, match="one machine"):
        merged("both", [run, elsewhere])


@pytest.mark.parametrize("noted", ({}, {"id": "unversioned"}, {"id": "unknown", "dirty": True}))
def test_results_from_outside_a_repository(noted: dict[str, Any], tmp_path: Path) -> None:
    path = result(tmp_path / "x.json", [entry("op", "ours", 0.1)])
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_info": noted}))
    assert read(path).machine["revision"] == ""


def test_no_result_of_this_suite(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"other\.json: expected a result"):
        read(tmp_path / "other.json")


def test_the_report_shortens_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a folder's parts, once: what the report reads, and every time with seven digits."""
    folder = tmp_path / "machine"
    folder.mkdir()
    paths = [tmp_path / "cpu.json", folder / "test_a.json", folder / "test_b.json"]
    for i, path in enumerate(paths):
        times = {"data": [0.1 + 0.2, 1.23456789e-7, 5e22], "none": None, "é": "\n ü"}
        result(path, [entry(f"op {i}", "ours", 1 / 3, times=times)])
        path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    other = folder / "ceilings.json"
    other.write_text("{ }")
    command = ["report", str(paths[0]), str(folder), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    report.main()
    written = [path.stat() for path in paths]
    page = (tmp_path / "out" / "README.md").read_text()
    for path in paths:
        text = path.read_text()
        assert text.count("\n") == 1 and text.endswith("\n")
        (row,) = json.loads(text)["benchmarks"]
        assert row["stats"] == {"data": [0.6666667, 0.1666667, 0.3333333]}
        expected = {"data": [0.3, 1.234568e-7, 5e22], "none": None, "é": "\n ü"}
        assert row["extra_info"]["times"] == expected
    assert other.read_text() == "{ }", "no result"
    report.main()
    assert [path.stat().st_ino for path in paths] == [x.st_ino for x in written]
    assert (tmp_path / "out" / "README.md").read_text() == page


def test_committed_results_are_short() -> None:
    for path in (x for run in ("cpu.json", "cpu-avx2.json", "h200") for x in files(RESULTS / run)):
        assert path.read_text().count("\n") == 1, f"{path}: make bench would shorten it"


def test_section_of_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace_section(readme, "new")
    assert readme.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        replace_section(readme, "new")
