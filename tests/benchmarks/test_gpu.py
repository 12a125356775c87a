"""The GPU command: its parts, and resumption after an interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import gpu
from benchmarks.harness import parts as listed
from benchmarks.harness.parts import Part, all_parts


def run_all(parts: list[Part], out: Path, seconds: float = 3600.0) -> bool:
    return gpu.run_all(parts, out, seconds)


def script(name: str, code: str, **options: object) -> Part:
    return Part(name, (sys.executable, "-c", code), **options)  # type: ignore[arg-type]


def test_a_failure_in_no_time_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    assert not run_all([script("broken", "raise SystemExit('why')")], tmp_path)
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
        script("slow", "import time; time.sleep(60)", share=1 / 3600),
        script("sanitized", "", tool=("no-such-tool",)),
    ]
    assert not run_all(parts, tmp_path)
    record = json.loads((tmp_path / "parts.json").read_text())
    outcomes = {key: entry["outcome"] for key, entry in record.items()}
    assert outcomes == {
        "good": "passed",
        "fragile": "failed (1)",
        "slow": "cut off after 1 s",
        "sanitized": "absent",
    }
    assert "    why" in capsys.readouterr().out
    fixed.touch()
    assert run_all(parts[:2] + parts[3:], tmp_path)
    assert ran.read_text() == "x", "what passed is not run again"
    lines = capsys.readouterr().out
    assert "good: passed before" in lines and "no-such-tool is not installed" in lines


def test_what_a_bare_machine_lacks_is_made_anew(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    parts = [script("build", f"open({str(ran)!r}, 'a').write('x')", anew=True)]
    assert run_all(parts, tmp_path) and run_all(parts, tmp_path)
    assert ran.read_text() == "xx" and all_parts(tmp_path, False)[0].anew


@pytest.mark.parametrize("status", (0, 1))
def test_a_tool_that_the_machine_forbids_is_absent(status: int, tmp_path: Path) -> None:
    says = f"print('==ERROR== ERR_NVGPUCTRPERM: no permission'); raise SystemExit({status})"
    tool = (sys.executable, "-c", says)
    found = gpu.run(Part("ncu", (), tool=tool), tmp_path / "log", 60, 60)
    assert found["outcome"] == "absent" and "ERR_NVGPUCTRPERM: no permission" in found["reason"]
    own = gpu.run(Part("own", tool), tmp_path / "log", 60, 60)
    expected = "failed (1)" if status else "passed"
    assert own["outcome"] == expected, "of a command of ours it is an error"


def test_a_run_stops_in_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST", 1)
    parts = [script("long", "import time; time.sleep(60)", share=1.0), script("next", "")]
    assert not run_all(parts, tmp_path, 2)
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["long"]["outcome"] == "cut off after 2 s"
    assert record["next"]["outcome"] == "left for the next run"
    assert "next: left for the next run" in capsys.readouterr().out
    assert run_all(parts[1:], tmp_path), "and the next run does it"


def test_a_part_compiles_into_a_folder_of_its_own(tmp_path: Path) -> None:
    """Each part compiles into its own folder, since torch writes in place and a part cut off leaves half a file."""
    code = "import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    for name in "ab":
        assert run_all([script(name, code)], tmp_path)
    folders = [Path((tmp_path / f"{name}.log").read_text().strip()) for name in "ab"]
    assert folders[0] != folders[1] and not any(folder.exists() for folder in folders)


def test_what_ends_the_command_ends_its_part(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    part = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = f"""
import sys
from benchmarks.harness import gpu
gpu.all_parts = lambda *_: [gpu.Part("long", (sys.executable, "-c", {part!r}), 1.0)]
gpu.main(["--rehearsal", "--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", command], cwd=gpu.ROOT)
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_results_of_other_sources_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    monkeypatch.setattr(gpu, "write_report", lambda out: reported.append(out) or True)
    results = {name: tmp_path / f"test_{name}.json" for name in "ab"}
    append = "open({!r}, 'a').write('{}')".format
    parts = [
        script("a", append(str(results["a"]), "new"), results=("test_a.json",)),
        script("b", append(str(results["b"]), "half ") + "; exit(1)", results=("test_b.json",)),
    ]
    for path in results.values():
        path.write_text("old")
    assert not run_all(parts, tmp_path)
    assert [path.read_text() for path in results.values()] == ["new", "half "]
    assert len(reported) == 3, "after each part, and at the end"
    assert not run_all(parts, tmp_path)
    assert [path.read_text() for path in results.values()] == ["new", "half half "], "it goes on"
    monkeypatch.setattr(gpu, "revision", lambda: "other")
    assert not run_all(parts, tmp_path, gpu.LEAST - 1)
    assert not any(path.exists() for path in results.values())


def test_a_run_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run continues, in a moved folder too: rows of a part that had begun with the same sources are kept."""
    file = tmp_path / "test_a.json"
    parts = [script("a", f"open({str(file)!r}, 'a').write('x')", results=(file.name,))]

    def killed(*_: object) -> None:
        file.write_text("row ")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "write_report", lambda out: True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_all(parts, tmp_path)
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["a"]["outcome"] == "cut off with the run"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("parts.json", file.name):
        (tmp_path / name).rename(moved / name)
    code = f"open({str(moved / file.name)!r}, 'a').write('x')"
    assert run_all([script("a", code, results=(file.name,))], moved)
    assert (moved / file.name).read_text() == "row x"


def test_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "alit").mkdir()
    found = {gpu.revision()}
    for content in ("a = 1", "a = 2"):
        (tmp_path / "alit" / "module.py").write_text(content)
        found.add(gpu.revision())
    (tmp_path / "alit" / "notes.txt").touch()
    assert len(found | {gpu.revision()}) == 3


def named(command: tuple[str, ...], beginning: str) -> set[str]:
    """Names of the tests and files in a command that start with ``beginning``."""
    found = (Path(x).name for x in command if ".py" in x)
    return {name for name in found if name.startswith(beginning)}


def test_what_runs_on_a_gpu(tmp_path: Path) -> None:
    parts = {part.name: part for part in all_parts(tmp_path, False)}
    assert list(parts) == [
        *("extension", "kernels", "training", "bound", "ops", "tiles-attention", "step"),
        *("models", "counters", "compiled", "memcheck", "racecheck"),
    ]
    ignored = [x for x in parts["kernels"].command if x.startswith("--ignore=")]
    assert ignored and all((gpu.ROOT / x.removeprefix("--ignore=")).exists() for x in ignored)
    for tool in ("memcheck", "racecheck"):
        assert parts[tool].tool[0] == "compute-sanitizer"
        assert parts[tool].tool[-2:] == ("--tool", tool)
    for name in ("kernels", "training", "memcheck", "racecheck"):
        assert f"--passed={tmp_path / parts[name].results[0]}" in parts[name].command
    assert parts["counters"].tool[0] == "ncu"
    suites = {p.name for p in (gpu.ROOT / "benchmarks" / "suites").glob("test_*.py")}
    step = gpu.ROOT / "benchmarks" / "suites" / "test_stage1_step.py"
    steps = set(re.findall(r"^def (test_\w+)", step.read_text(), re.MULTILINE))
    plain, compiled = (
        set().union(*(named(parts[name].command, "test_") for name in names))
        for names in (("ops", "step", "models"), ("compiled",))
    )
    assert len(suites) > 5 and suites <= {name.partition("::")[0] for name in plain}
    assert suites - {"test_encode_decode.py"} <= {name.partition("::")[0] for name in compiled}
    of_steps = {name.partition("::")[2] for name in plain | compiled} - {""}
    assert of_steps == steps
    for name in ("ops", "step", "models", "compiled"):
        assert f"--rows={tmp_path / parts[name].results[0]}" in parts[name].command
    assert all(0 < part.share <= 0.4 for part in parts.values())


def test_a_rehearsal_runs_the_same_parts(tmp_path: Path) -> None:
    real, rehearsed = (all_parts(tmp_path, rehearsal) for rehearsal in (False, True))
    assert [part.name for part in real] == [part.name for part in rehearsed]
    assert not any(part.tool for part in rehearsed), "it needs no tool of CUDA"


def test_what_measures_the_bound_is_there() -> None:
    search = (gpu.ROOT / listed.TESTS / "test_nearest_codeword.py").read_text()
    assert re.search(rf"^def test_\w*({'|'.join(listed.BOUND)})", search, re.MULTILINE)


def test_tuning_scripts_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "tune.py").touch()
    monkeypatch.setattr(listed, "KERNELS", tmp_path)
    for rehearsal, extra in ((True, ("--rehearsal", "--head-dim", "64")), (False, ())):
        _, part, *_ = listed.times(tmp_path, rehearsal)
        file = tmp_path / "tiles-op.json"
        assert part.command[1:] == ("-m", "alit_kernels.op.tune", "--json", str(file), *extra)
        assert part.results == (file.name,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--rehearsal"):
        gpu.main(["--out", str(tmp_path)])
