"""Fixtures of every test: two threads, NaN in every uninitialised tensor, a fixed seed; Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from alit_kernels.testing import nan_filled_empty

# Read when a Triton kernel is first imported: without a GPU, kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
