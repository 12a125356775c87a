"""Triton kernels of add_layer_norm: a row is read once, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_x,
    p_branch,
    p_branch_bias,
    p_weight,
    p_bias,
    p_total,
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
    """Write sum and layer norm of one row a program. ``p_stats`` (2, rows): mean, reciprocal deviation."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < C
    b_s = tl.load(p_x + row * x_pitch + o, mask=m, other=0.0).to(tl.float32)
    if BRANCH:
        b_branch = tl.load(p_branch + row * branch_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_branch += tl.load(p_branch_bias + o, mask=m, other=0.0).to(tl.float32)
        b_rounded = (b_s + b_branch).to(p_total.dtype.element_ty)
        tl.store(p_total + row * C + o, b_rounded, mask=m)
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
    p_grad_total,
    p_grad,
    p_total,
    p_weight,
    p_stats,
    p_grad_x,
    p_grad_branch,
    p_partial,
    rows,
    grad_total_pitch,
    grad_pitch,
    total_pitch,
    C: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write gradients of every P-th row, by P programs. ``p_partial`` (P, 3, C): sums for weight, bias, branch bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    o = tl.arange(0, BLOCK)
    m = o < C
    b_w = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK], tl.float32)
    b_db = tl.zeros([BLOCK], tl.float32)
    b_dr = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(rows - program, programs)):
        row = (program + step * programs).to(tl.int64)
        mean, deviation = tl.load(p_stats + row), tl.load(p_stats + rows + row)
        b_s = tl.load(p_total + row * total_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad + row * grad_pitch + o, mask=m, other=0.0).to(tl.float32)
        b_h = tl.where(m, (b_s - mean) * deviation, 0.0)
        b_a = b_g * b_w
        b_r = deviation * (b_a - tl.sum(b_a) / C - b_h * (tl.sum(b_a * b_h) / C))
        if p_grad_total is not None:
            p_row = p_grad_total + row * grad_total_pitch + o
            b_r += tl.load(p_row, mask=m, other=0.0).to(tl.float32)
        tl.store(p_grad_x + row * C + o, b_r.to(p_grad_x.dtype.element_ty), mask=m)
        if APART:
            tl.store(p_grad_branch + row * C + o, b_r.to(p_grad_branch.dtype.element_ty), mask=m)
        b_dw += b_g * b_h
        b_db += b_g
        b_dr += b_r
    p_part = p_partial + program.to(tl.int64) * 3 * C + o
    tl.store(p_part, b_dw, mask=m)
    tl.store(p_part + C, b_db, mask=m)
    tl.store(p_part + 2 * C, b_dr, mask=m)


@triton.jit(do_not_specialize=["programs"])
def sums_kernel(
    p_partial,
    p_before,
    p_sums,
    programs,
    WIDTH: tl.constexpr,
    BEFORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Write ``p_sums`` (WIDTH,): the sum of ``p_partial`` (programs, WIDTH) over programs, and of ``p_before``."""
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    o_share = tl.arange(0, SHARES)
    m = o < WIDTH
    b_sums = tl.zeros([SHARES, COLUMNS], tl.float32)
    for first in range(0, programs, SHARES):
        m_share = (first + o_share < programs)[:, None] & m[None]
        p_shares = p_partial + (first + o_share)[:, None] * WIDTH + o[None]
        b_sums += tl.load(p_shares, mask=m_share, other=0.0)
    b_sum = tl.sum(b_sums, axis=0)
    if BEFORE:
        b_sum += tl.load(p_before + o, mask=m)
    tl.store(p_sums + o, b_sum, mask=m)
