"""Of every test: it begins as if it were the first, with NaN in every uninitialized tensor; Triton's interpreter."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

# Threads without work sleep: where processes share the cores, waiting would take half of their time. Read when torch
# is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault(
    "TORCHINDUCTOR_COMPILE_THREADS", "1"
)  # processes that compile would import torch

import torch

# Without a GPU, kernels run in the interpreter. Triton reads this when it is first imported, which alit_kernels' use of
# torch.compile may cause: so before that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from alit_kernels.testing import nan_filled_empty

# torch remembers the functions that a default device applies to when it first needs them: here, before a test replaces
# some, and models meant for the meta device fill memory.
with torch.device("meta"):
    torch.empty(0)

#: Of each process of pytest-xdist. Processes that the tests start take the number from the environment.
THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(THREADS)


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reset_seed = False  # pytest-randomly's seed is that of the order alone


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay: no collection looks at them again


@pytest.fixture(autouse=True)
def _as_the_first_test() -> None:
    """Threads, seeds and compiled code are what they are in a test that runs alone, whatever ran before."""
    torch.set_num_threads(THREADS)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 # of libraries that draw from it
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def one_thread() -> None:
    """Models this small lose more to waking a second thread than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nan_filled_empty() -> Iterator[None]:
    """An output that an op leaves unwritten is NaN, not whatever was there."""
    with nan_filled_empty():
        yield
