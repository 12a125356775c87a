"""Fixtures of every test: two threads, NaN in every uninitialised tensor, a fixed seed; Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, kernels run in the interpreter. Triton reads this when it is first imported, which alit_kernels' use of
# torch.compile may cause: so before that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
