"""Fixtures of every test: two threads, NaN in every uninitialised tensor, a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alit_kernels.testing import nan_filled_empty


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _nan_filled_empty() -> Iterator[None]:
    """An output that an op leaves unwritten is NaN, not whatever was there."""
    with nan_filled_empty():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
