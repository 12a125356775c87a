"""Plugin for pytest: set up two devices of the null CUDA and load the core built for it, before tests are imported.

``python -m pytest --noconftest -p benchmarks.null_cuda.plugin --core FILE benchmarks/null_cuda``
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import driver, launches


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", type=Path, help="alit_kernels._C for the null CUDA")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["NULL_CUDA_DEVICES"] = "2"
    driver.prepare(config.getoption("core"))
    launches.watch()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if missing := driver.unknown():
        raise pytest.UsageError(
            f"the null CUDA has no body for {', '.join(missing)}, which was called"
        )
