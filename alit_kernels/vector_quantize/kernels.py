"""Triton kernels of vector quantization: one pass for gather and losses; backward one pass for z, sorted runs for the
codebook (see codebook_statistics/kernels.py).

Losses are summed in two stages of fixed order, block sums and their sum. The codebook's gradient uses no
atomics: the sort is the price of short keys, and nothing has shown atomics to be faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codebook_statistics.kernels import sum_of_code

EPSILON = tl.constexpr(1e-12)


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
    D: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Quantized rows, and a block's sum of (q - z)^2 and number of rows that take part."""
    block = tl.program_id(0).to(tl.int64)
    o_row = block * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    b_q = tl.load(p_codes + o_code[:, None] * D + o_dim[None, :], mask=m_tile, other=0.0)
    b_z = tl.load(p_z + o_row[:, None] * z_pitch + o_dim[None, :], mask=m_tile, other=0.0)
    b_step = b_q.to(tl.float32) - b_z.to(tl.float32)
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
    BLOCK: tl.constexpr,
):
    """The three losses from the blocks' sums, in one program."""
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, blocks, BLOCK):
        m_block = start + o_block < blocks
        b_sum += tl.load(p_partial + start + o_block, mask=m_block, other=0.0)
        b_count += tl.load(p_count + start + o_block, mask=m_block, other=0)
    elements = tl.maximum(tl.sum(b_count, 0) * dim, 1).to(tl.float32)
    codebook_loss = tl.sum(b_sum, 0) / elements
    tl.store(p_codebook, codebook_loss)
    tl.store(p_commitment, commitment * codebook_loss)
    tl.store(p_loss, commitment * codebook_loss + codebook_loss)


@triton.jit
def _through_unit(b_grad, b_x, b_norm):
    """Gradient through x / max(norm, eps) of rows: (g - u (u . g)) / norm, and g / eps where the norm is below eps."""
    b_safe = tl.broadcast_to(tl.maximum(b_norm, EPSILON)[:, None], b_x.shape)
    b_u = tl.div_rn(b_x, b_safe)  # in one dimension exactly 1 or -1, and the gradient exactly 0
    b_along = tl.where(b_norm > EPSILON, tl.sum(b_u * b_grad, 1), 0.0)[:, None]
    return (b_grad - b_u * b_along) / b_safe


@triton.jit
def _slope(p_count, elements, dim, MASKED: tl.constexpr):
    """2 / M, M the number of elements that take part."""
    if MASKED:
        return 2.0 / tl.maximum(tl.load(p_count) * dim, 1).to(tl.float32)
    else:
        return 2.0 / elements


@triton.jit(do_not_specialize=["rows"])
def grad_z_kernel(
    p_grad,
    p_grad_loss,
    p_grad_commitment,
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_count,
    p_norm,
    p_result,
    rows,
    grad_pitch,
    z_pitch,
    elements,
    commitment,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """du = dquantized + 2 c (u - q) dcommitment / M; under cosine through the normalisation, norms are stored."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    b_q = tl.load(p_codes + o_code[:, None] * D + o_dim[None, :], mask=m_tile, other=0.0)
    p_tile = p_z + o_row[:, None] * z_pitch + o_dim[None, :]
    b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    p_tile = p_grad + o_row[:, None] * grad_pitch + o_dim[None, :]
    b_grad = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    scale = _slope(p_count, elements, D, MASKED)
    scale *= commitment * (tl.load(p_grad_loss) + tl.load(p_grad_commitment))
    if COSINE:
        b_norm = tl.sqrt_rn(tl.sum(b_z * b_z, 1))
        b_u = tl.div_rn(b_z, tl.broadcast_to(tl.maximum(b_norm, EPSILON)[:, None], b_z.shape))
        b_grad = _through_unit(b_grad + scale * (b_u - b_q), b_z, b_norm)
        tl.store(p_norm + o_row, tl.maximum(b_norm, EPSILON), mask=m_stored)
    else:
        b_grad += scale * (b_z - b_q)
    m_tile = m_stored[:, None] & (o_dim < D)[None, :]
    b_grad = tl.where(m_row[:, None], b_grad, 0.0)
    p_tile = p_result + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_grad.to(p_result.dtype.element_ty), mask=m_tile)


@triton.jit
def grad_codes_kernel(
    p_partial,
    p_bounds,
    p_grad_loss,
    p_grad_codebook,
    p_codebook,
    p_count,
    p_result,
    elements,
    codebook_pitch,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """dq = 2 (q - u) dcodebook / M summed over one code's vectors; under cosine through the normalisation."""
    code = tl.program_id(0)
    o_dim = tl.arange(0, BD)
    scale = _slope(p_count, elements, D, MASKED)
    scale *= tl.load(p_grad_loss) + tl.load(p_grad_codebook)
    _, b_sum = sum_of_code(p_partial, p_bounds, code, D, CHUNK, BR, BD)
    b_grad = b_sum * scale
    if COSINE:
        p_row = p_codebook + code.to(tl.int64) * codebook_pitch + o_dim
        b_code = tl.load(p_row, mask=o_dim < D, other=0.0).to(tl.float32)[None, :]
        b_norm = tl.sqrt_rn(tl.sum(b_code * b_code, 1))
        b_grad = tl.sum(_through_unit(b_grad[None, :], b_code, b_norm), 0)
    b_grad = b_grad.to(p_result.dtype.element_ty)
    tl.store(p_result + code.to(tl.int64) * D + o_dim, b_grad, mask=o_dim < D)
