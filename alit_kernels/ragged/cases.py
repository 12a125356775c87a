"""Inputs of the ragged ops: one builder, one list of test shapes, one of benchmark shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """``lengths`` of the sequences, ``width`` of a row, ``spare`` unused rows of capacity."""

    lengths: tuple[int, ...]
    width: int
    spare: int = 0


class Inputs(NamedTuple):
    padded: Tensor
    lengths: Tensor
    max_length: int
    capacity: int


TEST_CASES = (
    Case((3, 1, 4), 5),
    Case((0, 2, 0, 3, 0), 4, spare=3),
    Case((1,), 1),
    Case((0, 0), 3, spare=2),
    Case((), 3, spare=1),
    Case((17, 31, 2), 7, spare=9),
)
BENCHMARK_CASES = (Case(tuple(257 + 32 * (i % 8 + 1) for i in range(64)), 1024),)


def make(
    case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Padded rows whose padding is NaN (it must never be read), and lengths."""
    generator = torch.Generator().manual_seed(seed)
    max_length = max(case.lengths, default=0) + 1
    padded = torch.randn(
        len(case.lengths), max_length, case.width, generator=generator, dtype=torch.float64
    )
    lengths = torch.tensor(case.lengths, dtype=torch.int64)
    padded[torch.arange(max_length) >= lengths[:, None]] = torch.nan
    return Inputs(
        padded.to(device, dtype), lengths.to(device), max_length, sum(case.lengths) + case.spare
    )
