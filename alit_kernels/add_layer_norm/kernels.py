"""Triton kernels of add_layer_norm: a row is read once, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_x,
    p_branch,
    p_weight,
    p_bias,
    p_sum,
    p_normalized,
    p_stats,
    rows,
    x_pitch,
    branch_pitch,
    eps,
    C: tl.constexpr,
    BRANCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. ``p_stats`` (2, rows): mean, reciprocal deviation."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < C
    b_s = tl.load(p_x + row * x_pitch + o, mask=m, other=0.0).to(tl.float32)
    if BRANCH:
        b_s += tl.load(p_branch + row * branch_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_rounded = b_s.to(p_sum.dtype.element_ty)
        tl.store(p_sum + row * C + o, b_rounded, mask=m)
        b_s = b_rounded.to(tl.float32)
    mean = tl.sum(b_s) / C
    b_d = tl.where(m, b_s - mean, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(b_d * b_d) / C + eps)
    b_w = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o, mask=m, other=0.0).to(tl.float32)
    b_y = b_d * deviation * b_w + b_b
    tl.store(p_normalized + row * C + o, b_y.to(p_normalized.dtype.element_ty), mask=m)
    tl.store(p_stats + row, mean)
    tl.store(p_stats + rows + row, deviation)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    p_grad,
    p_grad_sum,
    p_sum,
    p_weight,
    p_stats,
    p_grad_x,
    p_grad_branch,
    p_partial,
    rows,
    grad_pitch,
    grad_sum_pitch,
    sum_pitch,
    C: tl.constexpr,
    GRAD_SUM: tl.constexpr,
    APART: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every P-th row a program, of P. ``p_partial`` (P, 2, C): its sums for weight and bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    o = tl.arange(0, BLOCK)
    m = o < C
    b_w = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK], tl.float32)
    b_db = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(rows - program, programs)):
        row = (program + step * programs).to(tl.int64)
        mean, deviation = tl.load(p_stats + row), tl.load(p_stats + rows + row)
        b_s = tl.load(p_sum + row * sum_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad + row * grad_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_h = tl.where(m, (b_s - mean) * deviation, 0.0)
        b_a = b_g * b_w
        b_r = deviation * (b_a - tl.sum(b_a) / C - b_h * (tl.sum(b_a * b_h) / C))
        if GRAD_SUM:
            p_row = p_grad_sum + row * grad_sum_pitch + o
            b_r += tl.load(p_row, mask=m, other=0.0).to(tl.float32)
        tl.store(p_grad_x + row * C + o, b_r.to(p_grad_x.dtype.element_ty), mask=m)
        if APART:
            tl.store(p_grad_branch + row * C + o, b_r.to(p_grad_branch.dtype.element_ty), mask=m)
        if WEIGHT:
            b_dw += b_g * b_h
            b_db += b_g
    if WEIGHT:
        p_part = p_partial + program.to(tl.int64) * 2 * C + o
        tl.store(p_part, b_dw, mask=m)
        tl.store(p_part + C, b_db, mask=m)
