"""Triton search for the nearest codeword. No N x K matrix: a program keeps the best codes of its rows in registers.

``precision="ieee"`` takes direct differences, two float32 operations per element, no tensor core. At the small D this
op is made for (12: 24 operations per pair; comparing and remembering are five more) one direct pass is simple, and
rounding analysis says how good it is: each term (z - c)^2 carries at most 3 roundings, a fused sum D, so a distance has
relative error (D + 2) 2^-24.

From D = 17 on, tensor cores go first, with |c|^2 / 2 - z c, whose error is bounded too, but grows with |z| |c| and not
with the distance. Where the best score is ahead of the second by more than twice that bound, its code is the nearest.
All other rows, few of ordinary data, all of them at a large common offset, take the direct pass.

The direct pass also keeps the second least distance of each lane. A row is searched again in float64, where no square
of a float32 over- or underflows, if another code is within twice that error (so exact ties take the lowest index), or
if its least distance is infinite or below 2^-90 (unless it is 0 because z = c). On other data that is about one row in
10^5.

Distances are compared as unsigned integers: they are not negative, so bits order as values do, and NaN of either
sign is larger than infinity and never wins.

``precision="tf32"`` and ``"bf16"`` take the scores of tensor cores alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITE, INFINITE_64 = tl.constexpr(0x7F800000), tl.constexpr(0x7FF0000000000000)
TINY = tl.constexpr(37 << 23)  # bits of 2^-90
SMALL, LARGE = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
EPSILON = tl.constexpr(1e-12)


@triton.jit
def norms(b_x):
    """max(norm, 1e-12) of rows (rows, channels) float32, in float64."""
    b_wide = b_x.to(tl.float64)
    return tl.maximum(tl.sqrt(tl.sum(b_wide * b_wide, 1)), EPSILON)


@triton.jit
def wide_units(b_x):
    """Rows divided by max(norm, 1e-12), in float64."""
    return b_x.to(tl.float64) * (1.0 / norms(b_x))[:, None]


@triton.jit
def units(b_x):
    """Those rounded once to float32: the same in all kernels, whatever their tiles."""
    return wide_units(b_x).to(tl.float32)


@triton.jit
def _scan(
    b_z,
    p_z,
    p_codes,
    step,
    code_pitch,
    end,
    D: tl.constexpr,
    UNROLLED: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """Bits of the least distance of each row over codes 0..end - 1, its index, and whether another comes close."""
    o_code = tl.arange(0, BJ)[:, None] * BK + tl.arange(0, BK)[None, :]
    p_codes += o_code.to(tl.int64) * step
    b_best = tl.full([BM, BJ, BK], 0x7F800001, tl.uint32)  # above infinity, below every NaN
    b_second = b_best
    b_start = tl.zeros([BM, BJ, BK], tl.int32)
    for start in range(0, end, BJ * BK):
        b_distance = tl.zeros([BM, BJ, BK], tl.float32)
        if UNROLLED:
            for d in tl.static_range(D):
                b_step = b_z[d] - tl.load(p_codes + d * code_pitch + start)[None, :]
                b_distance += b_step * b_step
        else:
            for d in range(D):
                b_row = tl.load(p_z + d).to(tl.float32)[:, None, None]
                b_step = b_row - tl.load(p_codes + d * code_pitch + start)[None, :]
                b_distance += b_step * b_step
        b_bits = b_distance.to(tl.uint32, bitcast=True)
        m_better = b_bits < b_best
        b_second = tl.minimum(b_second, tl.maximum(b_bits, b_best))
        b_best = tl.where(m_better, b_bits, b_best)
        b_start = tl.where(m_better, start, b_start)
    b_least = tl.min(tl.min(b_best, 1), 1)
    b_index = tl.where(b_best == b_least[:, None, None], b_start + o_code[None, :], 0x7FFFFFFF)
    # Twice the relative error of a distance, and some for the rounding of this product.
    b_limit = b_least.to(tl.float32, bitcast=True) * (1 + (2 * D + 12) * 5.960464477539063e-08)
    b_limit = b_limit.to(tl.uint32, bitcast=True)[:, None, None]
    b_close = (b_best <= b_limit).to(tl.int32) + (b_second <= b_limit).to(tl.int32)
    return b_least, tl.min(tl.min(b_index, 1), 1), tl.sum(tl.sum(b_close, 1), 1) > 1


@triton.jit
def _scan_exactly(
    p_z,
    p_codes,
    step,
    code_pitch,
    end,
    D: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Bits of the least distance of each row in float64, and its lowest index."""
    o_code = tl.arange(0, BK)
    p_codes += o_code.to(tl.int64) * step
    b_best = tl.full([BM, BK], 0x7FF0000000000001, tl.uint64)
    b_start = tl.zeros([BM, BK], tl.int32)
    for start in range(0, end, BK):
        b_distance = tl.zeros([BM, BK], tl.float64)
        for d in range(D):
            b_row = tl.load(p_z + d).to(tl.float32).to(tl.float64)[:, None]
            b_step = b_row - tl.load(p_codes + d * code_pitch + start).to(tl.float64)[None, :]
            b_distance += b_step * b_step
        b_bits = b_distance.to(tl.uint64, bitcast=True)
        m_better = b_bits < b_best
        b_best = tl.where(m_better, b_bits, b_best)
        b_start = tl.where(m_better, start, b_start)
    b_least = tl.min(b_best, 1)
    b_index = tl.where(b_best == b_least[:, None], b_start + o_code[None, :], 0x7FFFFFFF)
    return tl.where(b_least <= INFINITE_64, tl.min(b_index, 1), 0)


@triton.jit
def _apart(p_z, p_codes, code_pitch, D: tl.constexpr, BM: tl.constexpr):
    """Whether rows differ from given codes in any channel."""
    b_apart = tl.zeros([BM], tl.int32)
    for d in range(D):
        b_apart |= (tl.load(p_z + d).to(tl.float32) != tl.load(p_codes + d * code_pitch)).to(
            tl.int32
        )
    return b_apart != 0


@triton.jit(do_not_specialize=["rows", "step"])
def search_kernel(
    p_z,
    p_codes,
    p_mask,
    p_index,
    rows,
    z_pitch,
    code_pitch,
    step,
    D: tl.constexpr,
    UNROLLED: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """Index of the nearest code of BM rows. Where masked it is 0, or with KEEP what is there.

    p_codes is (D, code_pitch) float32, padded with NaN. ``step`` is 1, which the compiler must not know: it would load
    codes four at a time and pass them through shared memory, with a barrier for each d.
    """
    code_pitch = code_pitch.to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    p_z += tl.minimum(o_row, rows - 1) * z_pitch
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    b_z = ()
    if UNROLLED:
        for d in tl.static_range(D):
            b_row = tl.load(p_z + d).to(tl.float32)[:, None, None]
            b_z = b_z + (b_row,)  # type: ignore[assignment]  # noqa: RUF005
    end = code_pitch.to(tl.int32) * tl.max(
        m_row.to(tl.int32), 0
    )  # nothing to search where all are masked
    b_least, b_index, m_contested = _scan(
        b_z, p_z, p_codes, step, code_pitch, end, D, UNROLLED, BM, BJ, BK
    )
    b_index = tl.where(b_least <= INFINITE, b_index, 0)
    m_uncertain = (b_least >= INFINITE) | (b_least < TINY)
    if tl.max((m_row & (m_contested | m_uncertain)).to(tl.int32), 0) != 0:
        m_uncertain &= _apart(p_z, p_codes + b_index, code_pitch, D, BM)
        m_again = m_row & (m_contested | m_uncertain)
        end *= tl.max(m_again.to(tl.int32), 0)
        b_exact = _scan_exactly(p_z, p_codes, step, code_pitch, end, D, BM, BK)
        b_index = tl.where(m_again, b_exact, b_index)
    b_index = tl.where(m_row, b_index, 0)
    m_stored = m_row if KEEP else o_row < rows
    tl.store(p_index + o_row, b_index.to(tl.int64), mask=m_stored)


@triton.jit
def _rows(p_x, o_row, m_tile, pitch, D: tl.constexpr, NORMALISED: tl.constexpr, BD: tl.constexpr):
    b_x = tl.load(p_x + o_row[:, None] * pitch + tl.arange(0, BD)[None, :], mask=m_tile, other=0.0)
    b_x = b_x.to(tl.float32)
    return units(b_x) if NORMALISED else b_x


@triton.jit(do_not_specialize=["rows", "codes", "code_blocks"])
def prepare_kernel(
    p_codebook,
    p_z,
    p_columns,
    p_codes,
    p_u,
    p_half_norm,
    p_largest,
    rows,
    codes,
    code_blocks,
    z_pitch,
    codebook_pitch,
    columns_pitch,
    D: tl.constexpr,
    NORMALISED: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """What a search reads, as far as it is asked for (other addresses are None).

    Of BK codes: columns (D, pitch) float32, padded with NaN; rows, perhaps normalised; |c|^2 / 2, infinite for codes
    that are not finite, and the largest of finite ones, which is infinite where a square overflows. Programs behind
    those of codes: BK rows of z, perhaps normalised.
    """
    program = tl.program_id(0)
    o_dim = tl.arange(0, BD)
    m_dim = (o_dim < D)[None, :]
    if program < code_blocks:
        o_code = program * BK + tl.arange(0, BK)
        m_code = o_code < codes
        m_tile = m_code[:, None] & m_dim
        b_codes = _rows(p_codebook, o_code.to(tl.int64), m_tile, codebook_pitch, D, NORMALISED, BD)
        if p_codes is not None:
            p_tile = p_codes + o_code[:, None].to(tl.int64) * D + o_dim[None, :]
            tl.store(p_tile, b_codes.to(p_codes.dtype.element_ty), mask=m_tile)
        if p_columns is not None:
            p_tile = p_columns + o_dim[None, :].to(tl.int64) * columns_pitch + o_code[:, None]
            b_columns = tl.where(m_code[:, None], b_codes, float("nan"))
            tl.store(p_tile, b_columns, mask=(o_code < columns_pitch)[:, None] & m_dim)
        if p_half_norm is not None:
            b_half = 0.5 * tl.sum(b_codes * b_codes, 1)
            b_other = tl.max(tl.where(tl.abs(b_codes) < float("inf"), 0, 1), 1)
            m_finite = m_code & (b_other == 0)
            tl.store(p_half_norm + o_code, tl.where(m_finite, b_half, float("inf")), mask=m_code)
            tl.store(p_largest + program, tl.max(tl.where(m_finite, b_half, 0.0), 0))
    elif p_u is not None:
        o_row = (program - code_blocks).to(tl.int64) * BK + tl.arange(0, BK)
        m_tile = (o_row < rows)[:, None] & m_dim
        b_u = _rows(p_z, o_row, m_tile, z_pitch, D, NORMALISED, BD)
        p_tile = p_u + o_row[:, None] * D + o_dim[None, :]
        tl.store(p_tile, b_u.to(p_u.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["rows", "codes", "code_blocks"])
def products_kernel(
    p_z,
    p_codes,
    p_half_norm,
    p_largest,
    p_mask,
    p_index,
    p_doubt,
    rows,
    codes,
    code_blocks,
    dim,
    z_pitch,
    error,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    CERTIFIED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """The code of the least |c|^2 / 2 - z c, on tensor cores. p_codes is (K, D), contiguous, dtype of z.

    With CERTIFIED also which rows are in doubt: those whose second score is not ahead of the first by more than both
    may err, ``error`` times |z| R + R^2 / 2 each, with R the largest norm of a code.
    """
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    o_dim, o_lane = tl.arange(0, BD), tl.arange(0, BK)
    b_least = tl.full([BM], float("inf"), tl.float32)
    b_second = b_least
    b_index = tl.zeros([BM], tl.int32)
    for start in range(0, codes * tl.max(m_row.to(tl.int32), 0), BK):
        o_code = start + o_lane
        m_code = o_code < codes
        b_product = tl.zeros([BM, BK], tl.float32)
        for first in range(0, dim, BD):
            m_dim = first + o_dim < dim
            p_tile = p_z + o_row[:, None] * z_pitch + first + o_dim[None, :]
            b_z = tl.load(p_tile, mask=m_row[:, None] & m_dim[None, :], other=0.0)
            p_tile = p_codes + o_code[:, None].to(tl.int64) * dim + first + o_dim[None, :]
            b_codes = tl.load(p_tile, mask=m_code[:, None] & m_dim[None, :], other=0.0)
            b_product = tl.dot(b_z, b_codes.T, b_product, input_precision=PRECISION)
        b_half_norm = tl.load(p_half_norm + o_code, mask=m_code, other=float("inf"))
        b_score = b_half_norm[None, :] - b_product
        b_score = tl.where(b_score == b_score, b_score, float("inf"))
        b_tile_least = tl.min(b_score, 1)
        b_tile_index = tl.min(tl.where(b_score == b_tile_least[:, None], o_code[None, :], codes), 1)
        m_better = b_tile_least < b_least
        if CERTIFIED:
            m_first = o_code[None, :] == b_tile_index[:, None]
            b_tile_second = tl.min(tl.where(m_first, float("inf"), b_score), 1)
            b_other = tl.where(m_better, b_least, b_tile_least)
            b_second = tl.minimum(b_second, tl.minimum(b_tile_second, b_other))
        b_least = tl.where(m_better, b_tile_least, b_least)
        b_index = tl.where(m_better, b_tile_index, b_index)
    b_index = tl.where(m_row, b_index, 0)
    tl.store(p_index + o_row, b_index.to(tl.int64), mask=o_row < rows)
    if CERTIFIED:
        b_square = tl.zeros([BM], tl.float32)
        for first in range(0, dim, BD):
            p_tile = p_z + o_row[:, None] * z_pitch + first + o_dim[None, :]
            m_tile = m_row[:, None] & (first + o_dim < dim)[None, :]
            b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
            b_square += tl.sum(b_z * b_z, 1)
        b_half = tl.zeros([BK], tl.float32)
        for start in range(0, code_blocks, BK):
            m_block = start + o_lane < code_blocks
            b_half = tl.maximum(
                b_half, tl.load(p_largest + start + o_lane, mask=m_block, other=0.0)
            )
        half = tl.max(b_half, 0)
        b_error = error * (tl.sqrt(2 * half) * tl.sqrt(b_square) + half)
        # Products of codes so small may underflow, those of codes and vectors so large overflow.
        half = tl.where(half > SMALL, half, float("inf"))
        b_error = tl.where(tl.maximum(half, b_square) < LARGE, b_error, float("inf"))
        m_certain = b_second - b_least > 2 * b_error  # not where anything is NaN or overflows
        tl.store(p_doubt + o_row, tl.where(m_certain, False, m_row), mask=o_row < rows)
