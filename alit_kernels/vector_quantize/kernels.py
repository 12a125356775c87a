"""Triton kernels of vector quantization: one pass for gather and losses; backward one launch for z and the codebook, of
rows that are in the order of their codes (see codebook_statistics/kernels.py).

Losses are summed in two stages of fixed order, block sums and their sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codebook_statistics.kernels import sum_of_group
from ..nearest_codeword.units import EPSILON, norms, units, wide_units


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_quantized,
    p_partial,
    p_count,
    rows,
    z_pitch,
    codes_pitch,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write quantized rows, and a block's sum of (q - z)^2 and number of rows that take part."""
    block = tl.program_id(0).to(tl.int64)
    o_row = block * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    p_tile = p_codes + o_code[:, None] * codes_pitch + o_dim[None, :]
    b_q = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_row[:, None] * z_pitch + o_dim[None, :], mask=m_tile, other=0.0)
    b_z = b_z.to(tl.float32)
    if COSINE:
        b_step = (wide_units(b_q) - wide_units(b_z)).to(tl.float32)
        b_q = units(b_q)
    else:
        b_step = b_q - b_z
    tl.store(p_partial + block, tl.sum(tl.sum(b_step * b_step, 1), 0))
    tl.store(p_count + block, tl.sum(m_row.to(tl.int32), 0))
    m_tile = m_stored[:, None] & (o_dim < D)[None, :]
    p_tile = p_quantized + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_q.to(p_quantized.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["blocks"])
def losses_kernel(
    p_partial,
    p_count,
    p_loss,
    p_commitment,
    p_codebook,
    blocks,
    dim,
    commitment,
    codebook_weight,
    BLOCK: tl.constexpr,
):
    """Write the three losses from the blocks' sums, in one program."""
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, blocks, BLOCK):
        m_block = start + o_block < blocks
        b_sum += tl.load(p_partial + start + o_block, mask=m_block, other=0.0)
        b_count += tl.load(p_count + start + o_block, mask=m_block, other=0)
    elements = tl.maximum(tl.sum(b_count, 0) * dim, 1).to(tl.float32)
    mean = tl.sum(b_sum, 0) / elements
    tl.store(p_codebook, codebook_weight * mean)
    tl.store(p_commitment, commitment * mean)
    tl.store(p_loss, commitment * mean + codebook_weight * mean)


@triton.jit
def _through_unit(b_grad, b_x):
    """Gradient through x / max(norm, eps) of rows: (g - u (u . g)) / norm, and g / eps where the norm is below eps."""
    b_norm = norms(b_x).to(tl.float32)
    b_u = units(b_x)  # in one dimension exactly 1 or -1, and the gradient exactly 0
    b_along = tl.where(b_norm > EPSILON, tl.sum(b_u * b_grad, 1), 0.0)[:, None]
    return (b_grad - b_u * b_along) / b_norm[:, None]


@triton.jit
def _slope(p_taking, taking, elements, D: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr):
    """Factor 2 / M, M the number of elements that take part."""
    if MASKED:
        b_taking = tl.zeros([BT], tl.int64)
        for start in range(0, taking, BT):
            o_block = start + tl.arange(0, BT)
            b_taking += tl.load(p_taking + o_block, mask=o_block < taking, other=0)
        return 2.0 / tl.maximum(tl.sum(b_taking, 0) * D, 1).to(tl.float32)
    else:
        return 2.0 / elements


@triton.jit(do_not_specialize=["rows"])
def count_kernel(p_mask, p_taking, rows, BN: tl.constexpr):
    """Write the number of rows of a block that take part."""
    o_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_mask = tl.load(p_mask + o_row, mask=o_row < rows, other=0)
    tl.store(p_taking + tl.program_id(0), tl.sum((b_mask != 0).to(tl.int32), 0))


@triton.jit
def _scalar(p_x):
    return 0.0 if p_x is None else tl.load(p_x)


@triton.jit
def _grad_z(
    block,
    to_z,
    p_grad,
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_result,
    rows,
    grad_pitch,
    z_pitch,
    codes_pitch,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write du = dquantized + to_z (u - q), under cosine through the normalization, of a block of rows."""
    o_row = block.to(tl.int64) * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    p_tile = p_codes + o_code[:, None] * codes_pitch + o_dim[None, :]
    b_q = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    p_tile = p_z + o_row[:, None] * z_pitch + o_dim[None, :]
    b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_grad = to_z * ((units(b_z) - units(b_q)) if COSINE else (b_z - b_q))
    if p_grad is not None:
        p_tile = p_grad + o_row[:, None] * grad_pitch + o_dim[None, :]
        b_grad += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    if COSINE:
        b_grad = _through_unit(b_grad, b_z)
    m_tile = m_stored[:, None] & (o_dim < D)[None, :]
    b_grad = tl.where(m_row[:, None], b_grad, 0.0)
    p_tile = p_result + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_grad.to(p_result.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "blocks", "codes", "groups", "taking"])
def grad_kernel(
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_grad,
    p_grad_loss,
    p_grad_commitment,
    p_grad_codebook,
    p_order,
    p_table,
    p_partial,
    p_taking,
    p_grad_z,
    p_grad_codes,
    rows,
    blocks,
    codes,
    groups,
    taking,
    elements,
    commitment,
    codebook_weight,
    z_pitch,
    codes_pitch,
    grad_pitch,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEBOOK: tl.constexpr,
    LONG: tl.constexpr,
    KB: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the gradient of a group of codes, dq = 2 w (q - u) dcodebook / M summed over their vectors; or, in programs
    behind those of groups, of a block of z, with 2 c (u - q) dcommitment / M.
    """
    program = tl.program_id(0)
    block = program
    if CODEBOOK:
        block -= groups
        if program < groups:
            _, b_sum = sum_of_group(
                program, p_index, p_z, p_codes, p_order, p_table, p_partial, blocks, groups,
                z_pitch, codes_pitch, D, True, COSINE, LONG, KB, BN, BT, BR, BD,
            )  # fmt: skip
            slope = _slope(p_taking, taking, elements, D, MASKED, BT)
            to_codes = codebook_weight * (_scalar(p_grad_loss) + _scalar(p_grad_codebook))
            b_grad = b_sum * (slope * to_codes)
            o_code, o_dim = program * KB + tl.arange(0, KB), tl.arange(0, BD)
            m_tile = (o_code < codes)[:, None] & (o_dim < D)[None, :]
            if COSINE:
                p_tile = p_codes + o_code[:, None].to(tl.int64) * codes_pitch + o_dim[None, :]
                b_code = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
                b_grad = _through_unit(b_grad, b_code)
            p_tile = p_grad_codes + o_code[:, None].to(tl.int64) * D + o_dim[None, :]
            tl.store(p_tile, b_grad.to(p_grad_codes.dtype.element_ty), mask=m_tile)
    if block >= 0:
        slope = _slope(p_taking, taking, elements, D, MASKED, BT)
        to_z = slope * (commitment * (_scalar(p_grad_loss) + _scalar(p_grad_commitment)))
        _grad_z(
            block, to_z, p_grad, p_z, p_codes, p_index, p_mask, p_grad_z, rows, grad_pitch,
            z_pitch, codes_pitch, D, COSINE, MASKED, BM, BD,
        )  # fmt: skip
