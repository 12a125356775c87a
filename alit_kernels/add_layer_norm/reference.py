"""The definition, in plain PyTorch.

With s = x + branch + branch_bias, mean m, r = (variance + eps)^-1/2 and h = (s - m) r of a row, the norm is h w + b
(Ba, Kiros, Hinton: Layer Normalization, 2016). Of its gradient g, with a = g w, the gradient of s is
r (a - mean(a) - h mean(a h)); those of w and b are the sums of g h and of g over all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (empty without a branch), its layer norm, and mean and reciprocal deviation of its rows, (2, ...)."""
    total = x
    if branch is not None and branch_bias is not None:
        rounded = torch.promote_types(x.dtype, branch.dtype)
        wide = accumulation_dtype(x.new_empty(0, dtype=rounded))
        total = (x.to(wide) + (branch.to(wide) + branch_bias)).to(rounded).contiguous()
    s = total.to(accumulation_dtype(total))
    mean = s.mean(-1, keepdim=True)
    centered = s - mean
    deviation = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = (centered * deviation * weight + bias).to(dtype).contiguous()
    stats = torch.stack((mean.squeeze(-1), deviation.squeeze(-1)))
    return x.new_empty(0) if branch is None else total, normalized, stats


def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_normalized: Tensor,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    before: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x; of the branch, empty where it is that of x; and (3, C), of weight, bias and branch_bias.

    ``before`` (3, C) is added to the last; ``grad_total`` is None where the sum was not used.
    """
    mean, deviation = (each[..., None] for each in stats)
    g = grad_normalized.to(mean.dtype)
    h = (total.to(mean.dtype) - mean) * deviation
    a = g * weight
    grad = deviation * (a - a.mean(-1, keepdim=True) - h * (a * h).mean(-1, keepdim=True))
    grad = (grad if grad_total is None else grad + grad_total).contiguous()
    rows = tuple(range(g.ndim - 1))
    sums = torch.stack([(g * h).sum(rows), g.sum(rows), grad.sum(rows)])
    apart = grad if branch_dtype != x_dtype else total.new_empty(0)
    return (
        grad.to(x_dtype),
        apart.to(branch_dtype),
        sums if before is None else (sums + before).contiguous(),
    )
