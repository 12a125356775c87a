"""Inputs of soft_codebook: one builder, one list of test shapes, one of benchmark shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Rows, codes, code channels, spread of the logits."""

    rows: int
    codes: int
    channels: int
    spread: float = 1.0


class Inputs(NamedTuple):
    logits: Tensor
    codebook: Tensor
    target: Tensor


TEST_CASES = (
    Case(6, 7, 5),
    Case(0, 4, 3),
    Case(1, 1, 1),
    Case(9, 130, 17, spread=30.0),
    Case(5, 3, 2, spread=0.0),
)
BENCHMARK_CASES = (Case(8192, 1024, 256), Case(512, 8192, 256), Case(1024, 1024, 256))


def make(
    case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Random logits, codebook and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(case.rows, case.codes, generator=generator, dtype=torch.float64) * case.spread
    )
    codebook = torch.randn(case.codes, case.channels, generator=generator, dtype=torch.float64)
    target = torch.randint(case.codes, (case.rows,), generator=generator)
    return Inputs(logits.to(device, dtype), codebook.to(device, dtype), target.to(device))
