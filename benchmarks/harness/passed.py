"""Plugin for pytest: leave out tests that have passed in an earlier run.

``python -m pytest -p benchmarks.harness.passed --passed=FILE``: the name of a test is appended to FILE as soon as it
has passed or was skipped. Works with xdist: FILE is read before the first test, and written by the main process alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, help="names of tests that need not run again")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("passed"):
        config.pluginmanager.register(_Passed(file, not hasattr(config, "workerinput")))


class _Passed:
    def __init__(self, file: Path, writes: bool) -> None:
        self._file, self._writes = file, writes
        self._known = set(file.read_text().splitlines()) if file.exists() else set()
        self._failed: set[str] = set()

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        gone = [item for item in items if item.nodeid in self._known]
        items[:] = [item for item in items if item.nodeid not in self._known]
        config.hook.pytest_deselected(items=gone)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed and self._writes:
            with self._file.open("a") as file:
                print(report.nodeid, file=file)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._known:
            session.exitstatus = pytest.ExitCode.OK
