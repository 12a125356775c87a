"""The GPU commands: what they run, and going on after an interruption."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import gpu
from benchmarks.harness.gpu import Part, report_parts, run_all, tune_parts
from benchmarks.harness.gpu import test_parts as parts_of_tests


def script(name: str, code: str, **options: object) -> Part:
    return Part(name, (sys.executable, "-c", code), **options)  # type: ignore[arg-type]


def test_a_failure_in_no_time_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    assert not run_all("test", [script("broken", "raise SystemExit('why')")], tmp_path)
    assert "failed (1)  0.0 s\n    why\n" in capsys.readouterr().out


def test_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran, fixed = tmp_path / "ran", tmp_path / "fixed"
    count = f"open({str(ran)!r}, 'a').write('x')"
    fragile = (
        f"import pathlib, sys; print('why'); sys.exit(not pathlib.Path({str(fixed)!r}).exists())"
    )
    parts = [
        script("good", count),
        script("fragile", fragile),
        script("slow", "import time; time.sleep(60)", limit=1),
        script("sanitized", "", tool=("no-such-tool",)),
    ]
    assert not run_all("test", parts, tmp_path)
    record = json.loads((tmp_path / "parts.json").read_text())
    outcomes = {key: entry["outcome"] for key, entry in record.items()}
    assert outcomes == {
        "test good": "passed",
        "test fragile": "failed (1)",
        "test slow": "cut off after 1 s",
        "test sanitized": "absent",
    }
    assert "    why" in capsys.readouterr().out
    fixed.touch()
    assert run_all("test", parts[:2] + parts[3:], tmp_path)
    assert ran.read_text() == "x", "what passed is not run again"
    lines = capsys.readouterr().out
    assert "test good: passed before" in lines and "no-such-tool is not installed" in lines


def test_what_a_bare_machine_lacks_is_made_anew(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    parts = [script("build", f"open({str(ran)!r}, 'a').write('x')", anew=True)]
    assert run_all("report", parts, tmp_path) and run_all("report", parts, tmp_path)
    assert ran.read_text() == "xx" and report_parts(tmp_path, False)[0].anew


@pytest.mark.parametrize("status", (0, 1))
def test_a_tool_that_the_machine_forbids_is_absent(status: int, tmp_path: Path) -> None:
    says = f"print('==ERROR== ERR_NVGPUCTRPERM: no permission'); raise SystemExit({status})"
    tool = (sys.executable, "-c", says)
    found = gpu.run(Part("ncu", (), tool=tool), tmp_path / "log", 60)
    assert found["outcome"] == "absent" and "ERR_NVGPUCTRPERM: no permission" in found["reason"]
    own = gpu.run(Part("own", tool), tmp_path / "log", 60)
    expected = "failed (1)" if status else "passed"
    assert own["outcome"] == expected, "of a command of ours it is an error"


def test_a_run_stops_in_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST", 1)
    parts = [script("long", "import time; time.sleep(60)"), script("next", "")]
    assert not run_all("test", parts, tmp_path, 2)
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["test long"]["outcome"] == "cut off after 2 s"
    assert record["test next"]["outcome"] == "left for the next run"
    assert "test next: left for the next run" in capsys.readouterr().out
    assert run_all("test", parts[1:], tmp_path), "and the next run does it"


def test_results_of_other_sources_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "write_report", lambda out: True)
    results = {name: tmp_path / f"{name}.json" for name in ("test_a", "test_b")}
    parts = [
        script("test_a", f"open({str(results['test_a'])!r}, 'w').write('new')"),
        script("test_b", "raise SystemExit(1)"),
    ]
    for path in results.values():
        path.write_text("old")
    assert not run_all("report", parts, tmp_path)
    assert results["test_a"].read_text() == "new" and not results["test_b"].exists()
    parts[1] = script("test_b", f"open({str(results['test_b'])!r}, 'w').write('fixed')")
    assert run_all("report", parts, tmp_path)
    assert [path.read_text() for path in results.values()] == ["new", "fixed"]
    monkeypatch.setattr(gpu, "revision", lambda: "other")
    assert not run_all("report", parts, tmp_path, gpu.LEAST - 1)
    assert not any(path.exists() for path in results.values())


def test_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "alit").mkdir()
    found = {gpu.revision()}
    for content in ("a = 1", "a = 2"):
        (tmp_path / "alit" / "module.py").write_text(content)
        found.add(gpu.revision())
    (tmp_path / "alit" / "notes.txt").touch()
    assert len(found | {gpu.revision()}) == 3


def test_what_runs_on_a_gpu(tmp_path: Path) -> None:
    step_file = gpu.ROOT / "benchmarks" / "suites" / "test_stage1_step.py"
    tests = {part.name: part for part in parts_of_tests(tmp_path, False)}
    assert {"extension", "kernels", "training"} <= tests.keys()
    ignored = [x for x in tests["kernels"].command if x.startswith("--ignore=")]
    assert ignored and all(Path(x.removeprefix("--ignore=")).exists() for x in ignored)
    for tool in ("memcheck", "racecheck"):
        assert tests[tool].tool[:3] == ("compute-sanitizer", "--tool", tool)
    names = {part.name for part in report_parts(tmp_path, False)}
    suites = {p.stem for p in (gpu.ROOT / "benchmarks" / "suites").glob("test_*.py")}
    steps = set(re.findall(r"^def (test_\w+)", step_file.read_text(), re.MULTILINE))
    assert len(suites) > 5 and names == suites | steps | {"extension", "ncu"}
    for part in (*parts_of_tests(tmp_path, True), *report_parts(tmp_path, True)):
        assert not part.tool, "a rehearsal needs no tool of CUDA"


def test_tuning_scripts_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "tune.py").touch()
    monkeypatch.setattr(gpu, "KERNELS", tmp_path)
    for rehearsal, extra in ((True, ("--rehearsal",)), (False, ())):
        (part,) = tune_parts(tmp_path, rehearsal)
        assert part.command[1:] == ("-m", "alit_kernels.op.tune", *extra)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--rehearsal"):
        gpu.main(["test", "--out", str(tmp_path)])
