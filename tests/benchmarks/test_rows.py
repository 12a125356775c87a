"""A result file written row by row: rows of a run that is cut off, and the cases that the next run repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from benchmarks.harness.contest import Contest, Work, ready
from benchmarks.harness.rows import Rows, compiled
from benchmarks.harness.runs import compact, read
from tests.helpers.pytest_runs import run_pytest

ABOUT = {
    "machine_info": {"alit": {"ceilings": {"copy_gigabytes": 1.0}}},
    "commit_info": {"id": "0123456789", "dirty": False},
}
CONFTEST = """
import benchmarks.conftest
benchmarks.conftest.ceilings = dict  # which take longer than all else
pytest_plugins = ["benchmarks.conftest"]
"""
SUITE = """
import os
from pathlib import Path
import pytest
from benchmarks.harness.contest import Absent, Contest, Work, ready

def missing():
    raise Absent("no such library")

def failing():
    if not Path("mended").exists():
        raise RuntimeError("broken")
    return lambda: None

def make(group):
    with open("made", "a") as file:
        print(group, file=file)
    names = ("eager", "ours", "torch.compile")
    calls = ready(dict.fromkeys(names, lambda: None)) | {"missing": missing}
    if group == "b":
        calls["failing"] = failing
    return Contest(calls, lambda found: None, Work(bytes=1), against_first=False)

@pytest.mark.parametrize("name", ("eager", "ours", "torch.compile", "missing", "failing"))
@pytest.mark.parametrize("group", "ab")
def test_it(group, name, race):
    if group == "b" and name == "ours" and Path("killed").exists():
        os._exit(9)
    if (group, name) != ("a", "failing"):
        race(group, name, lambda: make(group), rounds=3)
"""


def contenders(path: Path) -> dict[str, list[str]]:
    return {group: list(rows) for group, rows in read(path).groups.items()}


def test_a_case_is_whole_when_all_have_rows_or_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "test_x.json"
    rows = Rows(path, lambda: ABOUT)
    rows.begin("case", ("ours", "peer", "other"))
    assert not rows.whole("case") and not path.exists()
    rows.add("case", {"contender": "ours"}, [1.0, 2.0])
    rows.leave_out("case", "peer", "absent: not installed")
    assert not rows.whole("case")
    assert read(path).left_out == {"case": {"peer": "absent: not installed"}}
    again = Rows(path)
    assert contenders(path) == {"case": ["ours"]} and not again.whole("case")
    again.add("case", {"contender": "other"}, [1.0])
    assert Rows(path).whole("case") and not Rows(path).whole("another")
    compact(path)
    assert Rows(path).whole("case"), "the report leaves it so"
    again.begin("case", ("ours", "peer"))
    assert not again.whole("case")
    again.add("case", {"contender": "ours"}, [3.0])
    again.leave_out("case", "peer", "wrong: off")
    assert not Rows(path).whole("case"), "what was wrong is tried again"
    assert [row.seconds for row in read(path).rows] == [[3.0]]
    content = json.loads(path.read_text())
    assert content["commit_info"] == ABOUT["commit_info"]


def test_nothing_is_kept_without_a_file() -> None:
    rows = Rows(None)
    rows.begin("case", ("ours",))
    rows.leave_out("case", "ours", "absent: no")
    assert rows.left_out == {"case": {"ours": "absent: no"}}


@pytest.mark.apart
def test_a_run_that_is_cut_off(tmp_path: Path) -> None:
    """Rows are written before a pytest process is killed; the next run repeats only the incomplete case."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_planted.py").write_text(SUITE)
    (tmp_path / "killed").touch()
    arguments = ("test_planted.py", "--rows=test_rows.json", "-q")
    found, made = tmp_path / "test_rows.json", tmp_path / "made"
    names = ["eager", "ours", "torch.compile"]
    run_pytest(tmp_path, *arguments)
    assert contenders(found) == {"a": names, "b": ["eager"]}
    (tmp_path / "killed").unlink()
    status, said = run_pytest(tmp_path, *arguments)
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert contenders(found) == {"a": names, "b": names}
    assert read(found).left_out["b"] == {
        "missing": "absent: no such library",
        "failing": "failed: broken",
    }
    (tmp_path / "mended").touch()
    status, said = run_pytest(tmp_path, *arguments)
    assert status == pytest.ExitCode.OK, said
    assert Rows(found).whole("a") and Rows(found).whole("b")
    assert contenders(found) == {"a": names, "b": [*names, "failing"]}
    assert made.read_text().split() == ["a", "b", "b", "b"]


@pytest.mark.apart
def test_peers_that_a_compiler_writes_have_cases_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_planted.py").write_text(SUITE)
    (tmp_path / "mended").touch()
    for peers in ("plain", "compiled"):
        arguments = (f"--rows=test_{peers}.json", f"--peers={peers}", "-q")
        status, said = run_pytest(tmp_path, "test_planted.py", *arguments)
        assert status == pytest.ExitCode.OK, said
    found = contenders(tmp_path / "test_plain.json")
    assert found == {"a": ["eager", "ours"], "b": ["eager", "ours", "failing"]}
    beside = ["ours", "torch.compile"]
    assert contenders(tmp_path / "test_compiled.json") == {
        f"{group}, beside compiled peers": beside for group in "ab"
    }


def test_names_of_compiled_peers() -> None:
    from benchmarks.peers.attention import CONTENDERS

    assert [name for name in CONTENDERS if compiled(name)] == ["torch.compile", "FlexAttention"]
    assert compiled("ours, compiled and captured")


def test_what_is_held_against_the_first_keeps_it() -> None:
    from benchmarks.conftest import chosen

    calls = ready(dict.fromkeys(("eager", "other", "ours", "torch.compile"), lambda: None))
    race = Contest(calls, lambda *_: None, Work(), against_first=True)
    assert chosen(race, "compiled") == ["eager", "ours", "torch.compile"]
    assert chosen(race, "plain") == ["eager", "other", "ours"]
    del race.prepare["torch.compile"]
    assert chosen(race, "compiled") == [] and len(chosen(race, "all")) == 3
