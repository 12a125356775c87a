"""Plain PyTorch definition of nearest_codeword: direct differences in float64, a block of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._vectors import unit

#: Distances held at once: 128 MiB in float64, and a few temporaries of that size.
BLOCK = 2**24


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """Index (N,) int64 of the nearest codeword, always exact: ``precision`` permits others to be less so."""
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    if metric == "cosine":
        z, codebook = unit(z), unit(codebook)
    rows = max(1, BLOCK // max(1, codebook.shape[0]))
    index = [_nearest(block, codebook.to(dtype)) for block in z.to(dtype).split(rows)]
    return torch.cat(index) if index else torch.zeros(0, dtype=torch.int64, device=z.device)


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    codes = codebook.shape[0]
    distance = torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    valid = ~distance.isnan()
    smallest = torch.where(valid, distance, torch.inf).amin(1, keepdim=True)
    # The lowest index among the smallest distances; argmin does not promise which of several it returns.
    code = torch.arange(codes, device=z.device)
    index = torch.where(valid & (distance == smallest), code, codes).amin(1)
    return torch.where(index == codes, 0, index)
