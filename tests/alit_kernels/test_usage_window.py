"""UsageWindow against a deque of the last codes."""

from __future__ import annotations

import copy
from collections import Counter, deque
from typing import Any

import pytest
import torch

from alit_kernels.nn import ResidualVQ, UsageWindow, VectorQuantizer


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("masked", (False, True))
def test_the_last_codes_count(masked: bool, dtype: torch.dtype) -> None:
    """Usage equals that of the last codes for batches smaller and larger than the window, empty and fully masked."""
    window, expected = UsageWindow(9, size=20), deque[int](maxlen=20)
    assert window.usage().fraction == 0
    for rows in (3, 0, 8, 12, 50, 1, 7):
        index = torch.randint(9, (rows, 2), dtype=dtype)
        mask = torch.rand(rows, 2) > (2 if rows == 8 else 0.4) if masked else None
        window.update(index, mask)
        expected.extend((index if mask is None else index[mask]).flatten().tolist())
        usage, count = window.usage(), Counter(expected)
        assert usage.count.tolist() == [count[code] for code in range(9)]
        assert usage.fraction == pytest.approx(len(count) / 9)
        assert window.recent[20 - len(expected) :].tolist() == list(expected)


def test_results_and_their_masks() -> None:
    module, window = VectorQuantizer(8, 4), UsageWindow(8, size=100)
    mask = torch.rand(5, 6) > 0.5
    result = module(torch.randn(5, 6, 4), mask)
    window.update(result)
    assert torch.equal(window.usage().count, module.usage(result).count)
    window.update(result, result.index > 3)
    both = result.index[mask & (result.index > 3)]
    assert torch.equal(window.recent[100 - len(both) :], both.int())
    residual, window = ResidualVQ(2, 8, 4, shared=True), UsageWindow(8)
    window.update(residual(torch.randn(3, 5, 4), levels=torch.tensor([1, 2, 0])))
    assert window.usage().count.sum() == 15 and len(window.recent) == 65536


@pytest.mark.parametrize("masked", (False, True))
def test_compiles_without_graph_break(masked: bool) -> None:
    window = UsageWindow(9, size=20)
    other = copy.deepcopy(window)
    update = torch.compile(other.update, fullgraph=True, backend="aot_eager")
    for rows in (13, 14):
        index, mask = torch.randint(9, (rows,)), torch.rand(rows) > 0.4 if masked else None
        window.update(index, mask), update(index, mask)
        assert torch.equal(window.recent, other.recent)


def test_it_is_in_no_state_dict() -> None:
    window = UsageWindow(9, size=20)
    assert not window.state_dict() and dict(window.named_buffers()).keys() == {"recent"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: UsageWindow(0), ValueError, "num_codes: expected at least 1, got 0"),
        (lambda w: UsageWindow(9, size=0), ValueError, "size: expected at least 1, got 0"),
        (lambda w: w.update(torch.ones(3)), TypeError, "index: expected dtype int32 or int64"),
        (lambda w: w.update([1]), TypeError, "index: expected a tensor, got list"),
        (
            lambda w: w.update(torch.ones(3).int(), torch.ones(2) > 0),
            ValueError,
            r"mask: expected shape \(3\), got \(2,\)",
        ),
        (lambda w: w.update(torch.ones(3).int(), torch.ones(3)), TypeError, "mask: expected dtype"),
        (lambda w: w.update(torch.ones(3).int().to("meta")), ValueError, "index: expected device"),
        (
            lambda w: (w.update(torch.tensor([9])), w.usage()),
            ValueError,
            r"index: expected values in 0\.\.8, got 9\.\.9",
        ),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(UsageWindow(9, size=20))
