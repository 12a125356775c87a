"""The op's implementation ``triton``: allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import as_rows, launch, next_power_of_2
from . import kernels

#: Programs of the backward, two a multiprocessor: each sums its share of the gradients of weight and bias.
PROGRAMS = 256


def warps(channels: int) -> int:
    """No fewer: four spill at 512 channels on sm_90, eight at 768, which leave a part of their block, on sm_80."""
    if channels < 512:
        return 4
    return 8 if channels == next_power_of_2(channels) else 16


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference."""
    flat, flat_branch = as_rows(x), None if branch is None else as_rows(branch)
    rows, channels = flat.shape
    if branch is None:
        total = x.new_empty(0)
    else:
        total = torch.empty(
            x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device
        )
    normalized = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = torch.empty((2, *x.shape[:-1]), dtype=torch.float32, device=x.device)
    launch(
        kernels.forward_kernel,
        (rows,),
        p_x=flat,
        p_branch=flat_branch,
        p_weight=weight.contiguous(),
        p_bias=bias.contiguous(),
        p_sum=None if branch is None else total,
        p_normalized=normalized,
        p_stats=stats,
        rows=rows,
        x_pitch=flat.stride(0),
        branch_pitch=0 if flat_branch is None else flat_branch.stride(0),
        eps=eps,
        C=channels,
        BRANCH=branch is not None,
        BLOCK=next_power_of_2(channels),
        num_warps=warps(channels),
    )
    return total, normalized, stats


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
    """See the reference for the formulas."""
    flat, grad = as_rows(total), as_rows(grad_normalized)
    flat_grad_sum = None if grad_sum is None else as_rows(grad_sum)
    rows, channels = flat.shape
    apart = branch_dtype not in (None, x_dtype)
    grad_x = torch.empty(total.shape, dtype=x_dtype, device=total.device)
    grad_branch = torch.empty(
        total.shape if apart else 0, dtype=branch_dtype or x_dtype, device=total.device
    )
    programs = min(rows, PROGRAMS)
    partial = torch.empty(
        (programs if weight_wanted else 0, 2, channels), dtype=torch.float32, device=total.device
    )
    launch(
        kernels.backward_kernel,
        (programs,),
        p_grad=grad,
        p_grad_sum=flat_grad_sum,
        p_sum=flat,
        p_weight=weight.contiguous(),
        p_stats=stats.contiguous(),
        p_grad_x=grad_x,
        p_grad_branch=grad_branch if apart else None,
        p_partial=partial if weight_wanted else None,
        rows=rows,
        grad_sum_pitch=0 if flat_grad_sum is None else flat_grad_sum.stride(0),
        grad_pitch=grad.stride(0),
        sum_pitch=flat.stride(0),
        C=channels,
        GRAD_SUM=grad_sum is not None,
        APART=apart,
        WEIGHT=weight_wanted,
        BLOCK=next_power_of_2(channels),
        num_warps=warps(channels),
    )
    sums = partial.sum(0).to(weight.dtype) if weight_wanted else weight.new_empty((2, 0))
    return grad_x, grad_branch, sums[0], sums[1]
