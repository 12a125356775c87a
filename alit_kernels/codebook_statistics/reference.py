"""Plain PyTorch definition of codebook_statistics: one indexed sum, accumulated in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    values = z.to(dtype)
    ones = torch.ones_like(index, dtype=dtype)
    if mask is not None:
        index = torch.where(mask, index, 0)
        values = torch.where(mask[:, None], values, 0.0)
        ones = torch.where(mask, ones, 0.0)
    index = index.long()
    # index_put with accumulate sorts on CUDA and runs in order on the CPU at float64: deterministic on both.
    count = torch.zeros(num_codes, dtype=dtype, device=z.device).index_put(
        (index,), ones, accumulate=True
    )
    total = torch.zeros(num_codes, z.shape[1], dtype=dtype, device=z.device)
    return count.float(), total.index_put((index,), values, accumulate=True).float()
