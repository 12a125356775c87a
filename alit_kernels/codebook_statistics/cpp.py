"""codebook_statistics in C++ (csrc/codebook_statistics)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import core, matrix, pointer, threads


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    count = torch.empty(num_codes, dtype=torch.float32)
    total = torch.empty(num_codes, z.shape[1], dtype=torch.float32)
    index, mask = index.contiguous(), None if mask is None else mask.contiguous()
    core().codebook_statistics(
        pointer(index),
        index.dtype == torch.int64,
        matrix(z),
        pointer(mask),
        num_codes,
        pointer(count),
        pointer(total),
        threads(),
    )
    return count, total
