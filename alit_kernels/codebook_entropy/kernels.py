"""Entropies of the soft assignment in Triton: a tile of distances at a time, nothing of size (N, K), no atomics.

Forward: programs of rows stream the codes for each row's maximum, sum and entropy (online softmax, Milakov and
Gimelshein, 2018); programs of codes stream the rows for the mean distribution; one program sums up. Backward: the
distributions again from maximum and sum, by programs of rows for z, by programs of codes for the codebook.

Distances need the precision that the temperature divides away. Up to 16 channels their products are plain float32, else
three TF32 products of split operands; 16-bit numbers are TF32 numbers, of which one product is exact. Products of
gradients are always three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..nearest_codeword.units import units
from ..vector_quantize.kernels import _scalar, _through_unit

TINY = tl.constexpr(2.0**-126)  # the least normal number, below which a logarithm may see 0


@triton.jit
def _tile(p_x, o_row, m_row, pitch, first, dim, BD: tl.constexpr):
    """Tile of rows, BD channels from ``first`` on, in float32; 0 out of bounds."""
    o_dim = first + tl.arange(0, BD)
    m_tile = m_row[:, None] & (o_dim < dim)[None, :]
    p_tile = p_x + o_row[:, None].to(tl.int64) * pitch + o_dim[None, :]
    return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _logits(
    p_z, p_codes, p_half_norm, o_row, m_row, o_code, m_code, z_pitch, scale,
    D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Logits (2 z c - |c|^2) / temperature, -inf where there is no code. ``scale`` is 2 / temperature."""
    b_product = tl.zeros([BM, BK], tl.float32)
    if PRECISION == "ieee":
        for d in tl.static_range(D):
            b_z = tl.load(p_z + o_row * z_pitch + d, mask=m_row, other=0.0)
            b_codes = tl.load(p_codes + o_code.to(tl.int64) * D + d, mask=m_code, other=0.0)
            b_product += b_z[:, None] * b_codes[None, :]
    else:
        for first in range(0, D, BD):
            b_z = _tile(p_z, o_row, m_row, z_pitch, first, D, BD)
            b_codes = _tile(p_codes, o_code, m_code, D, first, D, BD)
            b_product = tl.dot(b_z, b_codes.T, b_product, input_precision=PRECISION)
    b_half_norm = tl.load(p_half_norm + o_code, mask=m_code, other=float("inf"))
    return (b_product - b_half_norm[None, :]) * scale


@triton.jit
def _taking(p_mask, o_row, rows, MASKED: tl.constexpr):
    m_row = o_row < rows
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    return m_row


@triton.jit
def _times(b_p, b_x):
    """Product p x, 0 where p is 0 and x may be infinite."""
    return tl.where(b_p == 0.0, 0.0, b_p * b_x)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    p_z,
    p_codes,
    p_half_norm,
    p_mask,
    p_normalizer,
    p_entropy,
    rows,
    codes,
    z_pitch,
    scale,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Write maximum and sum of exponentials, (2, rows), and entropy of BM rows' distributions; 0 where masked."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = _taking(p_mask, o_row, rows, MASKED)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_weighted = tl.zeros([BM], tl.float32)  # the sum of exp(x - max) (x - max)
    for start in range(0, codes * tl.max(m_row.to(tl.int32), 0), BK):
        o_code = start + tl.arange(0, BK)
        b_x = _logits(
            p_z, p_codes, p_half_norm, o_row, m_row, o_code, o_code < codes, z_pitch, scale,
            D, PRECISION, BM, BK, BD,
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_step = tl.where(b_max == float("-inf"), 0.0, b_max - b_new)
        b_shrink = tl.exp(b_step)
        b_x -= b_new[:, None]
        b_p = tl.exp(b_x)
        b_weighted = (b_weighted + b_sum * b_step) * b_shrink + tl.sum(_times(b_p, b_x), 1)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_max = b_new
    b_entropy = tl.log(b_sum) - b_weighted / b_sum
    m_stored = o_row < rows
    tl.store(p_normalizer + o_row, tl.where(m_row, b_max, 0.0), mask=m_stored)
    tl.store(p_normalizer + rows + o_row, tl.where(m_row, b_sum, 0.0), mask=m_stored)
    tl.store(p_entropy + o_row, tl.where(m_row, b_entropy, 0.0), mask=m_stored)


@triton.jit(do_not_specialize=["rows", "split"])
def means_kernel(
    p_z,
    p_codes,
    p_half_norm,
    p_mask,
    p_normalizer,
    p_partial,
    rows,
    codes,
    z_pitch,
    scale,
    split,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the sum over ``split`` rows (a multiple of BM) of their distributions, for BK codes."""
    o_code = tl.program_id(0) * BK + tl.arange(0, BK)
    part = tl.program_id(1).to(tl.int64)
    m_code = o_code < codes
    b_total = tl.zeros([BK], tl.float32)
    first = part * split
    for start in range(0, tl.minimum(split, rows - first), BM):
        o_row = first + start + tl.arange(0, BM)
        m_row = _taking(p_mask, o_row, rows, MASKED)
        b_x = _logits(
            p_z, p_codes, p_half_norm, o_row, m_row, o_code, m_code, z_pitch, scale,
            D, PRECISION, BM, BK, BD,
        )  # fmt: skip
        b_max = tl.load(p_normalizer + o_row, mask=m_row, other=0.0)
        b_sum = tl.load(p_normalizer + rows + o_row, mask=m_row, other=1.0)
        b_p = tl.exp(b_x - b_max[:, None]) / b_sum[:, None]
        b_total += tl.sum(tl.where(m_row[:, None], b_p, 0.0), 0)
    tl.store(p_partial + part * codes + o_code, b_total, mask=m_code)


@triton.jit(do_not_specialize=["rows", "parts"])
def entropies_kernel(
    p_entropy,
    p_mask,
    p_partial,
    p_sample,
    p_batch,
    p_mean,
    p_count,
    rows,
    codes,
    parts,
    epsilon,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write both entropies, the mean distribution, and the number of rows that take part, at least 1; one program."""
    o_block = tl.arange(0, BLOCK)
    b_sample = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        m_row = _taking(p_mask, start + o_block, rows, MASKED)
        b_sample += tl.load(p_entropy + start + o_block, mask=m_row, other=0.0)
        b_count += m_row.to(tl.int32)
    count = tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
    b_batch = tl.zeros([BLOCK], tl.float32)
    for start in range(0, codes, BLOCK):
        o_code = start + o_block
        m_code = o_code < codes
        b_mean = tl.zeros([BLOCK], tl.float32)
        p_part = p_partial + o_code
        for _ in range(parts):
            b_mean += tl.load(p_part, mask=m_code, other=0.0)
            p_part += codes
        b_mean /= count
        tl.store(p_mean + o_code, b_mean, mask=m_code)
        b_batch -= tl.where(b_mean < TINY, 0.0, b_mean * tl.log(b_mean + epsilon))
    tl.store(p_sample, tl.sum(b_sample, 0) / count)
    tl.store(p_batch, tl.sum(b_batch, 0))
    tl.store(p_count, count)


@triton.jit
def _weights(p_grad_sample, p_grad_batch, p_count):
    """Weights of log p and of the slopes in a logit's gradient: -dsample / M, -dbatch / M."""
    count = tl.load(p_count)
    return -_scalar(p_grad_sample) / count, -_scalar(p_grad_batch) / count


@triton.jit
def _slopes(p_mean, o_code, m_code, epsilon):
    """Slopes d (a log(a + epsilon)) / d a of codes' means a, 0 where a is 0."""
    b_mean = tl.load(p_mean + o_code, mask=m_code, other=0.0)
    m_some = (b_mean >= TINY) | (b_mean != b_mean)
    b_safe = tl.where(m_some, b_mean + epsilon, 1.0)
    return tl.where(m_some, tl.log(b_safe) + b_mean / b_safe, 0.0)


@triton.jit(do_not_specialize=["rows"])
def grad_z_kernel(
    p_z,
    p_codes,
    p_half_norm,
    p_mask,
    p_mean,
    p_entropy,
    p_normalizer,
    p_count,
    p_grad_sample,
    p_grad_batch,
    p_constant,
    p_result,
    rows,
    codes,
    z_pitch,
    scale,
    epsilon,
    D: tl.constexpr,
    WANTED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """Write the gradient of BM rows and BC channels, where WANTED; and the constant of a row's logits' gradients,
    p (sample (x - max) + batch slope + constant), which sum to 0.
    """
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_channel = tl.program_id(1) * BC + tl.arange(0, BC)
    m_row = _taking(p_mask, o_row, rows, MASKED)
    sample, batch = _weights(p_grad_sample, p_grad_batch, p_count)
    b_max = tl.load(p_normalizer + o_row, mask=m_row, other=0.0)
    b_sum = tl.load(p_normalizer + rows + o_row, mask=m_row, other=1.0)
    end = codes * tl.max(m_row.to(tl.int32), 0)
    b_slope = tl.zeros([BM], tl.float32)
    for start in range(0, end, BK):
        o_code = start + tl.arange(0, BK)
        m_code = o_code < codes
        b_x = _logits(
            p_z, p_codes, p_half_norm, o_row, m_row, o_code, m_code, z_pitch, scale,
            D, PRECISION, BM, BK, BD,
        )  # fmt: skip
        b_p = tl.exp(b_x - b_max[:, None])
        b_slope += tl.sum(b_p * _slopes(p_mean, o_code, m_code, epsilon)[None, :], 1)
    b_entropy = tl.load(p_entropy + o_row, mask=m_row, other=0.0)
    b_constant = sample * (b_entropy - tl.log(b_sum)) - batch * (b_slope / b_sum)
    tl.store(p_constant + o_row, b_constant, mask=(o_row < rows) & (tl.program_id(1) == 0))
    if WANTED:
        b_result = tl.zeros([BM, BC], tl.float32)
        b_total = tl.zeros([BM], tl.float32)  # 0 but for rounding
        for start in range(0, end, BK):
            o_code = start + tl.arange(0, BK)
            m_code = o_code < codes
            b_x = _logits(
                p_z, p_codes, p_half_norm, o_row, m_row, o_code, m_code, z_pitch, scale,
                D, PRECISION, BM, BK, BD,
            )  # fmt: skip
            b_x -= b_max[:, None]
            b_slopes = _slopes(p_mean, o_code, m_code, epsilon)[None, :]
            b_grad = sample * b_x + (batch * b_slopes + b_constant[:, None])
            b_grad = _times(tl.exp(b_x) / b_sum[:, None], b_grad)
            b_codes = _tile(p_codes, o_code, m_code, D, tl.program_id(1) * BC, D, BC)
            b_result = tl.dot(b_grad, b_codes, b_result, input_precision="tf32x3")
            b_total += tl.sum(b_grad, 1)
        b_result -= b_total[:, None] * _tile(
            p_z, o_row, m_row, z_pitch, tl.program_id(1) * BC, D, BC
        )
        b_result = tl.where(m_row[:, None], b_result * scale, 0.0)
        m_tile = (o_row < rows)[:, None] & (o_channel < D)[None, :]
        p_tile = p_result + o_row[:, None] * D + o_channel[None, :]
        tl.store(p_tile, b_result.to(p_result.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "split"])
def grad_codes_kernel(
    p_z,
    p_codes,
    p_half_norm,
    p_mask,
    p_mean,
    p_constant,
    p_normalizer,
    p_count,
    p_grad_sample,
    p_grad_batch,
    p_partial,
    p_partial_sum,
    rows,
    codes,
    z_pitch,
    scale,
    epsilon,
    split,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """Sum logits' gradients, alone and times z, over ``split`` rows (a multiple of BM), for BK codes, BC channels."""
    o_code = tl.program_id(0) * BK + tl.arange(0, BK)
    o_channel = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2).to(tl.int64)
    m_code = o_code < codes
    sample, batch = _weights(p_grad_sample, p_grad_batch, p_count)
    b_slopes = (batch * _slopes(p_mean, o_code, m_code, epsilon))[None, :]
    b_result = tl.zeros([BK, BC], tl.float32)
    b_total = tl.zeros([BK], tl.float32)
    first = part * split
    for start in range(0, tl.minimum(split, rows - first), BM):
        o_row = first + start + tl.arange(0, BM)
        m_row = _taking(p_mask, o_row, rows, MASKED)
        b_x = _logits(
            p_z, p_codes, p_half_norm, o_row, m_row, o_code, m_code, z_pitch, scale,
            D, PRECISION, BM, BK, BD,
        )  # fmt: skip
        b_x -= tl.load(p_normalizer + o_row, mask=m_row, other=0.0)[:, None]
        b_sum = tl.load(p_normalizer + rows + o_row, mask=m_row, other=1.0)
        b_constant = tl.load(p_constant + o_row, mask=m_row, other=0.0)
        b_grad = sample * b_x + (b_slopes + b_constant[:, None])
        b_grad = _times(tl.exp(b_x) / b_sum[:, None], b_grad)
        b_grad = tl.where(m_row[:, None], b_grad, 0.0)
        b_z = _tile(p_z, o_row, m_row, z_pitch, tl.program_id(1) * BC, D, BC)
        b_result = tl.dot(tl.trans(b_grad), b_z, b_result, input_precision="tf32x3")
        b_total += tl.sum(b_grad, 0)
    p_tile = p_partial + (part * codes + o_code[:, None]) * D + o_channel[None, :]
    tl.store(p_tile, b_result, mask=m_code[:, None] & (o_channel < D)[None, :])
    m_code &= tl.program_id(1) == 0
    tl.store(p_partial_sum + part * codes + o_code, b_total, mask=m_code)


@triton.jit(do_not_specialize=["rows", "codes", "code_blocks", "parts"])
def finish_kernel(
    p_z,
    p_codebook,
    p_mask,
    p_grad_u,
    p_partial,
    p_partial_sum,
    p_grad_z,
    p_grad_codebook,
    rows,
    codes,
    code_blocks,
    parts,
    z_pitch,
    codebook_pitch,
    scale,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the gradients of BM codes, from the sums of parts of the rows in their order; in programs behind those of
    codes, of BM rows of z through their normalization.
    """
    program = tl.program_id(0)
    o_dim = tl.arange(0, BD)
    if program < code_blocks:
        o_code = program.to(tl.int64) * BM + tl.arange(0, BM)
        m_code = o_code < codes
        b_code = _tile(p_codebook, o_code, m_code, codebook_pitch, 0, D, BD)
        b_grad = tl.zeros([BM, BD], tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        o_part = o_code
        for _ in range(parts):
            b_grad += _tile(p_partial, o_part, m_code, D, 0, D, BD)
            b_sum += tl.load(p_partial_sum + o_part, mask=m_code, other=0.0)
            o_part += codes
        b_unit = units(b_code) if COSINE else b_code
        b_grad = (b_grad - b_sum[:, None] * b_unit) * scale
        if COSINE:
            b_grad = _through_unit(b_grad, b_code)
        p_tile = p_grad_codebook + o_code[:, None] * D + o_dim[None, :]
        m_tile = m_code[:, None] & (o_dim < D)[None, :]
        tl.store(p_tile, b_grad.to(p_grad_codebook.dtype.element_ty), mask=m_tile)
    elif p_grad_u is not None:
        o_row = (program - code_blocks).to(tl.int64) * BM + tl.arange(0, BM)
        m_row = _taking(p_mask, o_row, rows, MASKED)
        b_z = _tile(p_z, o_row, m_row, z_pitch, 0, D, BD)
        b_grad = _through_unit(_tile(p_grad_u, o_row, m_row, D, 0, D, BD), b_z)
        p_tile = p_grad_z + o_row[:, None] * D + o_dim[None, :]
        m_tile = (o_row < rows)[:, None] & (o_dim < D)[None, :]
        tl.store(p_tile, b_grad.to(p_grad_z.dtype.element_ty), mask=m_tile)
