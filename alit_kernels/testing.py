"""Test helpers for this library and other implementations of its ops: error budgets, exact-argmin check.

Two ideas: an *error budget* compares with float64 and allows k times the error that the same computation has in eager
PyTorch at the same precision; an *exact-argmin check* accepts an index only if no other codeword is closer beyond
the rounding of direct differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["assert_exact_nearest", "assert_within_budget", "nan_filled_empty"]


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, *, k: float = 2.0, what: str = "result"
) -> None:
    """Assert ``max|actual - exact| <= k max|eager - exact| + 4 eps max|exact|``.

    Args:
        actual: the result under test, in its dtype.
        eager: the same computation in eager PyTorch at the same precision.
        exact: the same computation in float64.
        k: 2 for results, 3 for gradients.
        what: name of the result in the error.

    Raises:
        AssertionError: out of budget, another shape, or NaN or Inf in other places than in ``exact``.
    """
    assert actual.shape == exact.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: finite in other places than expected"
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN in other places than expected"
    if exact.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    actual, eager, exact = (torch.where(finite, x.double(), 0.0) for x in (actual, eager, exact))
    error = (actual - exact).abs().max()
    allowed = k * (eager - exact).abs().max() + 4 * eps * exact.abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_exact_nearest(index: Tensor, z: Tensor, codebook: Tensor) -> None:
    """Assert that every index is exact: ``d(i) <= (1 + 2 (D + 2) 2^-24) min d``.

    d is the squared distance by direct differences in float64. Exact ties take the lowest index; a NaN distance never
    wins; a row whose distances are all NaN has index 0.

    Args:
        index: (N,) int64.
        z: (N, D); for the cosine metric the normalized vectors, in the precision in which they are searched.
        codebook: (K, D), likewise.
    """
    assert index.dtype == torch.int64 and index.shape == z.shape[:1]
    if index.numel() == 0:
        return
    assert int(index.min()) >= 0 and int(index.max()) < codebook.shape[0], "index out of range"
    distance = (z.double()[:, None] - codebook.double()[None]).square().sum(-1)
    valid = ~distance.isnan()
    smallest = torch.where(valid, distance, torch.inf).amin(1)
    chosen = distance.gather(1, index[:, None])[:, 0]
    none = ~valid.any(1)
    assert bool((index[none] == 0).all()), "a row of NaN distances must give index 0"
    assert not bool(chosen[~none].isnan().any()), "a NaN distance won"
    bound = smallest * (1 + 2 * (z.shape[1] + 2) * 2.0**-24)
    wrong = ~none & (chosen > bound)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {len(index)} indices are not nearest"
    lowest = (distance == chosen[:, None]).int().argmax(1)
    assert bool((index == lowest)[~none].all()), "an exact tie did not take the lowest index"


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Context manager: ``torch.empty`` and its kin give NaN (integers: the least value), so unwritten output shows."""

    def poisoned(function: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                elif tensor.dtype != torch.bool and not tensor.is_complex():
                    tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return empty

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
