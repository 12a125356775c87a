"""Tests that have passed in a run that was cut off are not run by the next one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.pytest_runs import run_pytest

SUITE = """
import os
from pathlib import Path
import pytest

@pytest.fixture
def fragile():
    yield
    assert Path("mended").exists()

def ran(name):
    with open("ran", "a") as file:
        file.write(name)

def test_good():
    ran("g")

def test_skipped():
    ran("s")
    pytest.skip("no reason")

def test_bad():
    ran("b")
    assert Path("mended").exists()

def test_fixture(fragile):
    ran("f")

def test_last():
    if not Path("mended").exists():
        os._exit(9)
    ran("l")
"""


@pytest.mark.apart
@pytest.mark.parametrize("options", ((), ("-n", "2")), ids=("alone", "xdist"))
def test_what_has_passed_is_left_out(options: tuple[str, ...], tmp_path: Path) -> None:
    if options and find_spec("xdist") is None:
        pytest.skip("xdist is not installed")
    (tmp_path / "test_planted.py").write_text(SUITE)
    plugin = ("-p", "benchmarks.harness.passed", f"--passed={tmp_path / 'passed'}")
    command = ("test_planted.py", "-q", "-p", "no:randomly", *plugin, *options)
    ran, mended = tmp_path / "ran", tmp_path / "mended"
    status, said = run_pytest(tmp_path, *command)
    assert status != pytest.ExitCode.OK, said
    names = {line.partition("::")[2] for line in (tmp_path / "passed").read_text().splitlines()}
    assert names == {"test_good", "test_skipped"} and set(ran.read_text()) == set("gsbf")
    ran.write_text("")
    mended.touch()
    status, said = run_pytest(tmp_path, *command)
    assert status == pytest.ExitCode.OK and set(ran.read_text()) == set("bfl"), said
    if not options:
        status, said = run_pytest(tmp_path, *command)
        assert status == pytest.ExitCode.OK and "5 deselected" in said
