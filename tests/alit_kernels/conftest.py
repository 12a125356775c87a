"""Two threads for every kernel, however many processes share the tests: their work is split among threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads(_as_the_first_test: None) -> None:
    torch.set_num_threads(2)
