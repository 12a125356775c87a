"""Normalization of vectors before the codebook ops compare them, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-12


def unit(x: Tensor) -> Tensor:
    """Rows divided by max(norm, 1e-12), in float32 at least: what cosine means here and in the published system."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def through_unit(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient through :func:`unit`: (g - u (u . g)) / norm, and g / eps where the norm is below eps."""
    norm = x.to(grad.dtype).norm(dim=-1, keepdim=True)
    u = x.to(grad.dtype) / norm.clamp(min=EPSILON)
    projected = torch.where(norm > EPSILON, grad - u * (u * grad).sum(-1, keepdim=True), grad)
    return projected / norm.clamp(min=EPSILON)
