"""What the codebook ops do to vectors before they compare them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-12


def unit(x: Tensor) -> Tensor:
    """Rows divided by max(norm, 1e-12), in float32 at least: what cosine means here and in the published system."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
