"""alit_kernels.testing: its checks can fail."""

from __future__ import annotations

import pytest
import torch

from alit_kernels.testing import assert_within_budget, nan_filled_empty


def test_nan_filled_empty() -> None:
    with nan_filled_empty():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty(4, dtype=torch.int32).eq(-(2**31)).all()


def test_budget_can_fail() -> None:
    exact = torch.randn(50, dtype=torch.float64)
    eager = exact.float()
    assert_within_budget(eager, eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(eager + 1e-5, eager, exact)
    with pytest.raises(AssertionError, match="finite in other places"):
        assert_within_budget(torch.where(eager > 0, eager, torch.nan), eager, exact)
