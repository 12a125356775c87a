"""The definition, in plain PyTorch.

With s = x + branch, mean m, deviation r = (var + eps)^-1/2 and h = (s - m) r of a row, the result is h w + b (Ba,
Kiros, Hinton: Layer Normalization, 2016). Of a gradient g of the result, with a = g w: the gradient of s is
r (a - mean(a) - h mean(a h)), that of w is sum(g h), that of b sum(g).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (empty without a branch), its layer norm, and mean and reciprocal deviation of the rows, (2, ...)."""
    total = x if branch is None else (x + branch).contiguous()
    wide = total.to(accumulation_dtype(total))
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    deviation = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = centred * deviation * weight + bias
    stats = torch.stack((mean.squeeze(-1), deviation.squeeze(-1)))
    return x.new_empty(0) if branch is None else total, normalized.to(dtype).contiguous(), stats


def add_layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normalized: Tensor,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x; of the branch, empty where it is that of x; of weight and bias, empty if not wanted."""
    mean, deviation = (each[..., None] for each in stats)
    g = grad_normalized.to(mean.dtype)
    h = (total.to(mean.dtype) - mean) * deviation
    a = g * weight
    grad = deviation * (a - a.mean(-1, keepdim=True) - h * (a * h).mean(-1, keepdim=True))
    grad = (grad if grad_sum is None else grad + grad_sum).contiguous()
    nothing = total.new_empty(0)
    apart = branch_dtype not in (None, x_dtype)
    grad_branch = grad.to(branch_dtype) if apart else nothing
    if not weight_wanted:
        return grad.to(x_dtype), grad_branch, nothing, nothing
    rows = tuple(range(g.ndim - 1))
    of_weight, of_bias = (g * h).sum(rows), g.sum(rows)
    return grad.to(x_dtype), grad_branch, of_weight.to(weight.dtype), of_bias.to(weight.dtype)
