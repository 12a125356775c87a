"""Inputs of the codebook ops (search, statistics, quantizer): one builder, test shapes, benchmark shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Number of vectors and of codes, dimension, a common offset, the codebook's layout, and presence of a mask."""

    vectors: int
    codes: int
    dim: int
    offset: float = 0.0
    layout: str = "normal"
    masked: bool = False


class Inputs(NamedTuple):
    z: Tensor
    codebook: Tensor
    mask: Tensor | None


TEST_CASES = (
    Case(1, 1, 1),
    Case(0, 3, 4),
    Case(37, 19, 12),
    Case(64, 300, 12, masked=True),
    Case(33, 65, 16, offset=1000.0),
    Case(50, 40, 12, layout="two clusters"),
    Case(50, 64, 8, layout="duplicates"),
    Case(40, 33, 3, layout="equal"),
    Case(31, 17, 5, layout="tiny"),
    Case(31, 17, 5, layout="huge"),
    Case(20, 30, 256),
    Case(5, 7, 512),
    # Above 16 dimensions kernels may search by products first.
    Case(70, 150, 20, masked=True),
    Case(17, 70, 24, offset=1000.0),
    Case(17, 70, 17, layout="duplicates"),
    Case(17, 70, 20, layout="two clusters"),
    Case(13, 17, 24, layout="equal"),
    Case(13, 17, 24, layout="tiny"),
    Case(13, 17, 24, layout="huge"),
)
BENCHMARK_CASES = (Case(8192, 4096, 12), Case(32768, 4096, 12), Case(8192, 1024, 256))


def make(
    case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Vectors and a codebook; masked vectors are NaN (they must never be read)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(case.vectors, case.dim, generator=generator, dtype=torch.float64)
    codebook = torch.randn(case.codes, case.dim, generator=generator, dtype=torch.float64)
    if case.layout == "two clusters":
        z[::2], z[1::2], codebook[::2], codebook[1::2] = (
            z[::2] + 1e3,
            z[1::2] - 1e3,
            codebook[::2] + 1e3,
            codebook[1::2] - 1e3,
        )
    elif case.layout == "duplicates":
        codebook[case.codes // 2 :] = codebook[: case.codes - case.codes // 2].flip(0)
    elif case.layout == "equal":
        codebook[:] = codebook[0].clone()
    elif case.layout in ("tiny", "huge"):
        scale = 1e-30 if case.layout == "tiny" else 1e30
        z, codebook = z * scale, codebook * scale
    mask = None
    z, codebook = (z + case.offset).to(device, dtype), (codebook + case.offset).to(device, dtype)
    if case.masked:
        mask = (torch.rand(case.vectors, generator=generator) > 0.3).to(device)
        z = torch.where(mask[:, None], z, torch.nan)
    return Inputs(z, codebook, mask)
