"""Inputs of add_layer_norm: one builder, one list of test shapes, one of benchmark shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Shape of x, presence of a branch, a common offset (the variance must survive it), scale of the rows."""

    shape: tuple[int, ...]
    branch: bool = True
    offset: float = 0.0
    scale: float = 1.0


class Inputs(NamedTuple):
    x: Tensor
    branch: Tensor | None
    branch_bias: Tensor | None
    weight: Tensor
    bias: Tensor


TEST_CASES = (
    Case((5, 24)),
    Case((2, 3, 16)),
    Case((2, 3, 16), branch=False),
    Case((0, 8)),
    Case((1, 40)),
    Case((3, 1)),
    Case((7, 33), offset=30.0),
    Case((4, 130), scale=1e-6),
    Case((6, 48), scale=1e4),
)
BENCHMARK_CASES = (Case((12, 513, 768)),)


def make(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    branch_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs; the branch is of ``branch_dtype``, by default the dtype of the others."""
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return torch.randn(case.shape, generator=generator, dtype=torch.float64) * case.scale

    x, branch = rows() + case.offset, rows()
    branch_bias, weight, bias = (
        each.to(device, dtype)
        for each in torch.randn(3, case.shape[-1], generator=generator, dtype=torch.float64)
    )
    return Inputs(
        x.to(device, dtype),
        branch.to(device, branch_dtype or dtype) if case.branch else None,
        branch_bias if case.branch else None,
        weight,
        bias,
    )
