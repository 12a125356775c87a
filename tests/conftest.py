"""Set up every test as if it ran alone, with NaN in uninitialized tensors; without a GPU, use Triton's interpreter."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

# Idle threads sleep: with processes sharing the cores, busy waiting would take half of their time. Read when torch is
# first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault(
    "TORCHINDUCTOR_COMPILE_THREADS", "1"
)  # processes that compile would import torch

import torch

# Without a GPU, kernels run in the interpreter. Triton reads this when it is first imported, which may be when
# alit_kernels uses torch.compile.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from alit_kernels.testing import nan_filled_empty

# torch caches the set of functions that a default device applies to at its first use. Use it before a test patches
# some of them, or models meant for the meta device would fill memory.
with torch.device("meta"):
    torch.empty(0)

#: Threads of each process of pytest-xdist. Processes started by tests read the number from the environment.
THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(THREADS)


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reset_seed = False  # pytest-randomly's seed is that of the order alone


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay: no collection looks at them again


@pytest.fixture(autouse=True)
def _as_the_first_test() -> None:
    """Reset threads, seeds and compiled code, so that a test runs as if alone."""
    torch.set_num_threads(THREADS)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 # for libraries that draw from it
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def one_thread() -> None:
    """Run the test on one thread: waking a second one costs small models more time than it saves."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nan_filled_empty() -> Iterator[None]:
    """Fill uninitialized tensors with NaN, so that outputs that an op leaves unwritten are found."""
    with nan_filled_empty():
        yield
