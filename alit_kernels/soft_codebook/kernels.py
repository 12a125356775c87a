"""Expected code in Triton: softmax and product in one pass over the logits; nothing of size (N, V) beside gradients.

Forward: online softmax (Milakov and Gimelshein, 2018) with the product accumulated beside it; it stores the maximum and
the sum of each row. Backward, logits: with p from these and p . g = dcode . code, which needs no logits, one pass gives
the gradient. The codebook's gradient is another pass, where it is wanted at all (a frozen base has none); its rows are
split among programs, whose sums are added in a fixed order: no atomics.

Above 256 channels of a codebook the forward and the codebook's gradient read the logits once for each 256.

float32 products are three TF32 products of operands in two parts (``_dot``, relative error about 2^-21; an infinite
code or gradient gives NaN): plain float32 products would spill, and TF32 alone misses the error budget of the tests.
Triton's own "tf32x3" does the same with one more accumulator, for which only small tiles have registers. bfloat16 and
float16 codebooks multiply probabilities in their own type and accumulate in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _large(b_x):
    """``b_x`` cut to the 11 significant bits that a TF32 product reads; NaN and infinity stay."""
    return (b_x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _small(b_x, b_large):
    """Rest ``b_x - b_large``, rounded to 11 significant bits."""
    b_bits = (b_x - b_large).to(tl.uint32, bitcast=True) + 0x1000
    return (b_bits & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(b_a, b_b, b_sum):
    """b_sum + b_a @ b_b; of float32 three TF32 products of parts, without that of the small ones."""
    if b_a.dtype == tl.float32:
        b_large_a, b_large_b = _large(b_a), _large(b_b)
        b_small_a, b_small_b = _small(b_a, b_large_a), _small(b_b, b_large_b)
        b_sum = tl.dot(b_small_a, b_large_b, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_large_a, b_small_b, b_sum, input_precision="tf32")
        b_sum = tl.dot(b_large_a, b_large_b, b_sum, input_precision="tf32")
    else:
        b_sum = tl.dot(b_a, b_b, b_sum)
    return b_sum


@triton.jit
def _exp_from(b_x, b_max):
    """exp(x - max) of rows, 0 where all of a row is -inf (its sum is then 0, and everything divided by it NaN)."""
    return tl.exp(b_x - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])


@triton.jit
def _of_target(p_logits, o_row, m_row, logits_pitch, o_target, codes):
    """Logits of the true codes; NaN where there is no such code."""
    m_target = m_row & (o_target >= 0) & (o_target < codes)
    b_true = tl.load(p_logits + o_row * logits_pitch + o_target, mask=m_target, other=float("nan"))
    return b_true.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_logits,
    p_codebook,
    p_target,
    p_code,
    p_nll,
    p_p_target,
    p_normalizer,
    rows,
    codes,
    channels,
    logits_pitch,
    codebook_pitch,
    TARGET: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
):
    """Write BM rows and BC channels of the code; those of the first channels also nll, p_target, sums."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_channel = tl.program_id(1) * BC + tl.arange(0, BC)
    m_row, m_channel = o_row < rows, o_channel < channels
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_code = tl.zeros([BM, BC], tl.float32)
    for start in range(0, codes, BV):
        o_code = start + tl.arange(0, BV)
        m_code = o_code < codes
        p_tile = p_logits + o_row[:, None] * logits_pitch + o_code[None, :]
        b_x = tl.load(p_tile, mask=m_row[:, None] & m_code[None, :], other=float("-inf"))
        b_x = b_x.to(tl.float32)
        p_tile = p_codebook + o_code[:, None].to(tl.int64) * codebook_pitch + o_channel[None, :]
        b_codes = tl.load(p_tile, mask=m_code[:, None] & m_channel[None, :], other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_p = _exp_from(b_x, b_new)
        b_shrink = tl.exp(b_max - tl.where(b_new == float("-inf"), 0.0, b_new))
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_code *= b_shrink[:, None]
        b_code = _dot(b_p.to(b_codes.dtype), b_codes, b_code)
        b_max = b_new
    b_code = (b_code / b_sum[:, None]).to(p_code.dtype.element_ty)
    p_tile = p_code + o_row[:, None] * channels + o_channel[None, :]
    tl.store(p_tile, b_code, mask=m_row[:, None] & m_channel[None, :])
    m_row &= tl.program_id(1) == 0
    tl.store(p_normalizer + o_row, b_max, mask=m_row)
    tl.store(p_normalizer + rows + o_row, b_sum, mask=m_row)
    if TARGET:
        o_target = tl.load(p_target + o_row, mask=m_row, other=0)
        b_true = _of_target(p_logits, o_row, m_row, logits_pitch, o_target, codes)
        b_nll = tl.log(b_sum) - (b_true - b_max)
        tl.store(p_nll + o_row, b_nll, mask=m_row)
        tl.store(p_p_target + o_row, tl.exp(-b_nll), mask=m_row)


@triton.jit
def _p(b_x, p_normalizer, o_row, m_row, rows):
    """Softmax of rows by their stored maximum and sum."""
    b_max = tl.load(p_normalizer + o_row, mask=m_row, other=0.0)
    b_sum = tl.load(p_normalizer + rows + o_row, mask=m_row, other=1.0)
    return _exp_from(b_x, b_max) / b_sum[:, None]


@triton.jit
def _mean_grad(
    p_code, p_grad_code, o_row, m_row, channels, grad_pitch, BM: tl.constexpr, BC: tl.constexpr
):
    """Products p . g = grad_code . code of rows, (BM,)."""
    b_mean = tl.zeros([BM], tl.float32)
    for first in range(0, channels, BC):
        o_channel = first + tl.arange(0, BC)
        m_tile = m_row[:, None] & (o_channel < channels)[None, :]
        p_tile = p_grad_code + o_row[:, None] * grad_pitch + o_channel[None, :]
        b_grad = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        p_tile = p_code + o_row[:, None] * channels + o_channel[None, :]
        b_mean += tl.sum(b_grad * tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32), 1)
    return b_mean


@triton.jit(do_not_specialize=["rows"])
def grad_logits_kernel(
    p_logits,
    p_codebook,
    p_target,
    p_code,
    p_grad_code,
    p_grad_nll,
    p_grad_p_target,
    p_normalizer,
    p_result,
    rows,
    codes,
    channels,
    logits_pitch,
    codebook_pitch,
    grad_pitch,
    split,
    TARGET: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
):
    """Write p (g - p . g + w) - w onehot, with g = grad_code @ codebook^T, w = dnll - p_target dp_target, for BM rows
    and ``split`` codes (a multiple of BV).
    """
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    b_shift = tl.zeros([BM], tl.float32)
    if p_grad_code is not None:
        b_shift = _mean_grad(p_code, p_grad_code, o_row, m_row, channels, grad_pitch, BM, BC)
    o_target = tl.full([BM], -1, tl.int64)
    b_weight = tl.zeros([BM], tl.float32)
    if TARGET:
        o_target = tl.load(p_target + o_row, mask=m_row, other=0)
        b_true = _of_target(p_logits, o_row, m_row, logits_pitch, o_target, codes)
        b_p_target = tl.sum(_p(b_true[:, None], p_normalizer, o_row, m_row, rows), 1)
        if p_grad_nll is not None:
            b_weight += tl.load(p_grad_nll + o_row, mask=m_row, other=0.0)
        if p_grad_p_target is not None:
            b_weight -= b_p_target * tl.load(p_grad_p_target + o_row, mask=m_row, other=0.0)
        b_shift -= b_weight
    first_code = tl.program_id(1) * split
    for start in range(first_code, tl.minimum(first_code + split, codes), BV):
        o_code = start + tl.arange(0, BV)
        m_code = o_code < codes
        b_grad_p = tl.zeros([BM, BV], tl.float32)
        for first in range(0, channels if p_grad_code is not None else 0, BC):
            o_channel = first + tl.arange(0, BC)
            m_channel = (o_channel < channels)[None, :]
            p_tile = p_grad_code + o_row[:, None] * grad_pitch + o_channel[None, :]
            b_grad = tl.load(p_tile, mask=m_row[:, None] & m_channel, other=0.0)
            p_tile = p_codebook + o_code[:, None].to(tl.int64) * codebook_pitch + o_channel[None, :]
            b_codes = tl.load(p_tile, mask=m_code[:, None] & m_channel, other=0.0)
            b_grad_p = _dot(b_grad, b_codes.T, b_grad_p)
        m_tile = m_row[:, None] & m_code[None, :]
        p_tile = p_logits + o_row[:, None] * logits_pitch + o_code[None, :]
        b_x = tl.load(p_tile, mask=m_tile, other=float("-inf")).to(tl.float32)
        b_p = _p(b_x, p_normalizer, o_row, m_row, rows)
        b_result = b_p * (b_grad_p - b_shift[:, None])
        if TARGET:
            m_target = o_code[None, :] == o_target[:, None]
            b_result = tl.where(m_target, b_result - b_weight[:, None], b_result)
        p_tile = p_result + o_row[:, None] * codes + o_code[None, :]
        tl.store(p_tile, b_result.to(p_result.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "split"])
def grad_codebook_kernel(
    p_logits,
    p_grad_code,
    p_normalizer,
    p_partial,
    rows,
    codes,
    channels,
    logits_pitch,
    grad_pitch,
    split,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
):
    """Write p^T grad_code over ``split`` rows (a multiple of BM), for BV codes and BC channels."""
    o_code = tl.program_id(0) * BV + tl.arange(0, BV)
    o_channel = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2).to(tl.int64)
    m_code, m_channel = o_code < codes, o_channel < channels
    b_result = tl.zeros([BV, BC], tl.float32)
    first = part * split
    for start in range(0, tl.minimum(split, rows - first), BM):
        o_row = first + start + tl.arange(0, BM)
        m_row = o_row < rows
        p_tile = p_logits + o_row[:, None] * logits_pitch + o_code[None, :]
        b_x = tl.load(p_tile, mask=m_row[:, None] & m_code[None, :], other=float("-inf"))
        b_p = _p(b_x.to(tl.float32), p_normalizer, o_row, m_row, rows)
        p_tile = p_grad_code + o_row[:, None] * grad_pitch + o_channel[None, :]
        b_grad = tl.load(p_tile, mask=m_row[:, None] & m_channel[None, :], other=0.0)
        b_p = tl.trans(b_p.to(b_grad.dtype))
        b_result = _dot(b_p, b_grad, b_result)
    p_tile = p_partial + (part * codes + o_code[:, None]) * channels + o_channel[None, :]
    b_result = b_result.to(p_partial.dtype.element_ty)
    tl.store(p_tile, b_result, mask=m_code[:, None] & m_channel[None, :])


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(p_partial, p_result, parts, elements, BLOCK: tl.constexpr):
    """Write the sum over parts of (parts, elements), in their order; 0 without parts."""
    o_element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < elements
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        b_sum += tl.load(p_partial + o_element, mask=m_element, other=0.0)
        p_partial += elements
    tl.store(p_result + o_element, b_sum.to(p_result.dtype.element_ty), mask=m_element)
