"""The op's implementation ``triton``: allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: Programs of the backward, two a multiprocessor: each sums its share of the rows.
PROGRAMS = 256
#: Columns that a program adds up over all shares.
COLUMNS = 32


def warps(channels: int) -> int:
    """Number of warps: four channels a thread; two where the block is padded, or sm_80 would spill at 768."""
    block = next_power_of_2(channels)
    return min(max(block // (128 if block == channels else 64), 1), 16)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its layer norm, and mean and reciprocal deviation of its rows, as the reference returns them."""
    flat, flat_branch = as_rows(x), None if branch is None else as_rows(branch)
    rows, channels = flat.shape
    if branch is None:
        total = x.new_empty(0)
    else:
        # torch.promote_types is an operator, which no plan repeats.
        total = x.new_empty(x.shape, dtype=x.dtype if x.dtype == branch.dtype else torch.float32)
    normalized = x.new_empty(x.shape, dtype=dtype)
    stats = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    launch(
        kernels.forward_kernel,
        (rows,),
        p_x=flat,
        p_branch=flat_branch,
        p_branch_bias=None if branch_bias is None else branch_bias.contiguous(),
        p_weight=weight.contiguous(),
        p_bias=bias.contiguous(),
        p_total=None if branch is None else total,
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
    grad_total: Tensor | None,
    grad_normalized: Tensor,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    before: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as the reference returns them; see there for the formulas."""
    flat, grad = as_rows(total), as_rows(grad_normalized)
    flat_grad_total = None if grad_total is None else as_rows(grad_total)
    rows, channels = flat.shape
    apart = branch_dtype != x_dtype
    grad_x = total.new_empty(total.shape, dtype=x_dtype)
    grad_branch = total.new_empty(total.shape if apart else (0,), dtype=branch_dtype)
    programs = min(rows, PROGRAMS)
    partial = stats.new_empty((programs, 3, channels))
    sums = stats.new_empty((3, channels))
    launch(
        kernels.backward_kernel,
        (programs,),
        p_grad=grad,
        p_grad_total=flat_grad_total,
        p_total=flat,
        p_weight=weight.contiguous(),
        p_stats=stats.contiguous(),
        p_grad_x=grad_x,
        p_grad_branch=grad_branch if apart else None,
        p_partial=partial,
        rows=rows,
        grad_total_pitch=0 if flat_grad_total is None else flat_grad_total.stride(0),
        grad_pitch=grad.stride(0),
        total_pitch=flat.stride(0),
        C=channels,
        APART=apart,
        BLOCK=next_power_of_2(channels),
        num_warps=warps(channels),
    )
    launch(
        kernels.sums_kernel,
        (cdiv(3 * channels, COLUMNS),),
        p_partial=partial,
        p_before=None if before is None else before.contiguous(),
        p_sums=sums,
        programs=programs,
        WIDTH=3 * channels,
        BEFORE=before is not None,
        COLUMNS=COLUMNS,
        SHARES=64,
    )
    return grad_x, grad_branch, sums
