"""Counts and sums for a moving-average codebook, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from alit_kernels import codebook_statistics
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import DEVICE, Contest, Work, ready

QUICK = Case(2048, 512, 12)
Statistics = tuple[Tensor, Tensor]


def with_one_hot(index: Tensor, z: Tensor, codes: int) -> Statistics:
    matrix = one_hot(index, codes).to(z.dtype)
    return matrix.sum(0), matrix.t() @ z


def with_index_add(index: Tensor, z: Tensor, codes: int) -> Statistics:
    count = torch.zeros(codes, device=z.device).index_add_(0, index, torch.ones_like(z[:, 0]))
    return count, torch.zeros(codes, z.shape[1], device=z.device).index_add_(0, index, z)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, int], Statistics]] = {
    "ours": codebook_statistics,
    "eager, one-hot": with_one_hot,
    "eager, index_add": with_index_add,
}


def contest(case: Case) -> Contest:
    z, _, _ = make(case, device=DEVICE)
    index = torch.randint(case.codes, (case.vectors,), device=DEVICE)
    expected = with_index_add(index, z, case.codes)
    return Contest(
        ready({name: partial(f, index, z, case.codes) for name, f in CONTENDERS.items()}),
        partial(torch.testing.assert_close, expected=expected, rtol=1e-4, atol=1e-4),
        Work(4 * (z.numel() + case.codes * (case.dim + 1)) + 8 * case.vectors, z.numel()),
    )


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize(
    "case", BENCHMARK_CASES[::2], ids=lambda c: f"{c.vectors}x{c.codes}x{c.dim}"
)
def test_codebook_statistics(case: Case, name: str, race: Callable, quick: bool) -> None:
    if quick and case != BENCHMARK_CASES[0]:
        pytest.skip("--quick runs one shape")
    case = QUICK if quick else case
    group = f"codebook_statistics {case.vectors} x {case.codes} x {case.dim}"
    race(group, name, lambda: contest(case))
