"""Run every kernel on two threads, for any number of test processes, so that splitting among threads is tested."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads(_as_the_first_test: None) -> None:
    torch.set_num_threads(2)
