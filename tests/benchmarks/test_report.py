"""The report: tables of a run, invalid files, parts of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="pip install .[bench]")

from benchmarks.harness import outcome, report
from benchmarks.harness.report import ratios_of, write
from benchmarks.harness.runs import Run, files, merged, read
from benchmarks.harness.timing import RESULTS

MACHINE = {
    "cpu": "some CPU", "gpu": None, "threads": 2, "torch": "2.13.0", "date": "2026-01-02",
    "ceilings": {"copy_gigabytes": 10.0, "matmul_gigaflops": 100.0},
}  # fmt: skip
PARTS = {"base": 0.1, "encoder": 0.2, "decoder": 0.1, "attention": 0.3, "quantizer": 0.1}
PARTS |= {"optimizer": 0.1, "rest": 0.1}


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
    write([run], tmp_path / "out")
    section = ratios_of([run], ["cpu"])
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


GPU = {"gpu": "NVIDIA H200"}


@pytest.fixture
def gpu_run(tmp_path: Path) -> Run:
    """GPU run with device and host apart: an op, an op whose peer waits for the device, a model's path."""

    def row(group: str, name: str, device: float | None, host: float, **more: Any) -> dict:
        of_a_model = more.get("clock") == "events"
        median = more.pop("call", device or 1.0) / 1e6
        counts = {"device_us": device, "host_us": host, "launches": 2, "clock": "graph"}
        images = {"images": 2, "state_megabytes": 1.0} if of_a_model else {}
        return entry(group, name, median, **{**counts, **images, **more})

    search, step = "nearest_codeword 8192 x 1024 x 256", "stage-1 step base bfloat16 batch 32"
    entries = [
        row(search, "ours", 40.0, 20.0),
        row(search, "peer", 30.0, 30.0, launches=None),
        row("pack 64 sequences of 289 to 513", "ours", 60.0, 10.0, clock="kernels"),
        row("pack 64 sequences of 289 to 513", "copy", 50.0, 5.0, clock="kernels"),
        row(step, "ours", 9e4, 2e5, clock="events", call=2.2e5),
        row(step, "ours, captured", 9e4, 3e3, clock="events", call=1e5, flops=4 * 10**9),
        row("encode to 256 tokens", "ours", 5e4, 8e4, clock="events", call=1e5),
        row("encode to 256 tokens", "eager baseline", 9e4, 9e4, clock="events", call=1.5e5),
    ]
    return read(result(tmp_path / "h200-next.json", entries, **GPU))


def test_device_and_host_have_columns_of_their_own(gpu_run: Run, tmp_path: Path) -> None:
    write([gpu_run], tmp_path / "out")
    section = ratios_of([gpu_run], ["h200"])
    text = (tmp_path / "out" / "README.md").read_text()
    search = "| nearest_codeword 8192 x 1024 x 256 |"
    assert f"{search} ours | 40 us | 1.00 | 20 us | 1.00 |  |  | 20 to 80 | 2 |" in text
    assert f"{search} peer | 30 us | 0.75 | 30 us | 1.50 |  |  | 15 to 60 |  |" in text, "a loss"
    encode = "| encode to 256 tokens | eager baseline |"
    assert f"{encode} 9e+04 us | 1.80 | 9e+04 us | 1.12 | 1.5e+05 us | 1.50 |" in text
    assert "Device: the time of the GPU alone" in text and "not apart" not in text
    assert "†" not in text, "launches are in a column of their own"
    assert "| pack 64 sequences of 289 to 513 | copy | 50 us ‡ | 0.83 |" in text
    assert "‡: the sum of its kernels" in text
    assert f"{search} 0.75 peer (host 1.50) |" in section
    assert "| encode to 256 tokens | 1.50 eager baseline (host 1.12) |" in section
    assert "then the host's over ours" in section


def test_what_is_not_counted_is_left_empty(tmp_path: Path) -> None:
    """Without the profiler a call timed by events has no device time, and its cells are empty."""
    blind = {"device_us": None, "launches": None, "host_us": 5.0, "clock": "events"}
    entries = [entry("op", "ours", 1e-5, **blind), entry("op", "peer", 2e-5, **blind)]
    write([read(result(tmp_path / "x.json", entries, **GPU))], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| op | peer |  |  | 5 us | 1.00 | 20 us | 2.00 | 10 to 40 |  |" in text


def test_times_of_calls_are_shown_as_such(run: Run, tmp_path: Path) -> None:
    old = Run("h200", run.machine | GPU, run.rows)
    write([old], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| op 8 | peer | 50 ms | 25 to 100 | 0.50 |" in text
    assert "Device and host are not apart in this run: its times are of calls" in text
    write([run], tmp_path)
    assert "not apart" not in (tmp_path / "README.md").read_text(), "nor is a CPU's"


def test_targets_are_filled_from_runs_on_a_gpu(gpu_run: Run, run: Run, tmp_path: Path) -> None:
    write([run, Run("h200", run.machine | GPU, run.rows)], tmp_path)
    text = (tmp_path / "README.md").read_text()
    wide = "| nearest_codeword 8192 x 1024 x 256 | at most 45 us |"
    assert "| target | wanted | measured |" in text and f"{wide} unmeasured |" in text
    assert "(met)" not in text and "(missed)" not in text
    write([run, gpu_run], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| target | wanted | h200-next |" in text and f"{wide} 40 us (met) |" in text
    pack = "| pack 64 sequences of 289 to 513: time over a copy's | at most 1.15 |"
    assert f"{pack} 1.2 (missed) |" in text
    step = "| stage-1 step base bfloat16 batch 32, captured: of the matrix-product rate | at least 45 % |"
    assert f"{step} 40 % (missed) |" in text
    encode = "| encode to 256 tokens, float32: speed over eager's | at least 1 |"
    assert f"{encode} 1.5 (met) |" in text
    assert "| nearest_codeword 65536 x 4096 x 12 | at most 130 us | unmeasured |" in text


def test_parts_and_tiles(gpu_run: Run, tmp_path: Path) -> None:
    """The page shows outcomes of parts and tiles from the GPU command's folder."""
    part = {"command": "x", "revision": "y", "seconds": 3.5}
    parts = {
        "bound": part | {"outcome": "passed"},
        "counters": part | {"outcome": "absent", "reason": "ncu is not installed"},
    }
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    (tmp_path / "bound.log").write_text("passed\nmeasured: 0.3 of the bound\n")
    one, other = ({"tile": [64, n], "us": 1.0 * n, "spread_us": 0.5} for n in (32, 64))
    entries = {
        "forward 64 2": {"present": [64, 64], "chosen": [64, 32], "tiles": [one, other]},
        "forward 64 4": {"present": [64, 64], "chosen": [64, 64], "tiles": []},
    }
    (tmp_path / "tiles-attention.json").write_text(json.dumps(entries))
    found = outcome.parts(tmp_path) + outcome.tiles(tmp_path)
    write([gpu_run], tmp_path, [found])
    text = (tmp_path / "README.md").read_text()
    assert "| bound | passed | 3.5 s | 0.3 of the bound |" in text
    assert "| counters | absent | 3.5 s | ncu is not installed |" in text
    forward = "| attention forward 64 2 | (64, 64) | 64.0 us ± 0.5 |"
    assert f"{forward} (64, 32) | 32.0 us ± 0.5 | 2 |" in text
    assert "| (64, 64) | does not run |  | does not run | 0 |" in text
    assert outcome.parts(tmp_path / "x.json") == outcome.tiles(tmp_path / "x.json") == ""


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
    """Reports of incomplete runs: a step without the eager one, two different runs, nothing to compare."""

    def written(*runs: Run) -> str:
        write(list(runs), tmp_path)
        return ratios_of(runs, [x.name for x in runs]) + (tmp_path / "README.md").read_text()

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
    """The report compacts a file and a folder's parts once: entries that it reads, and times with seven digits."""
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
    for path in (
        x
        for run in ("cpu.json", "cpu-xeon.json", "cpu-avx2.json", "h200")
        for x in files(RESULTS / run)
    ):
        assert path.read_text().count("\n") == 1, f"{path}: make bench would shorten it"
