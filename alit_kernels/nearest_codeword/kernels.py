"""Triton search for the nearest codeword, exact whatever the data, without an N x K matrix. Four launches:

prepare: codes and vectors, less a centre, in float16 parts, and their norms; under "cosine" normalised first.
propose: scores |c|^2 / 2 - z c on tensor cores. A program has BM vectors and a part of the codebook, so that there are
    programs for the whole chip; it keeps the two best codes of each vector, and the least of all other scores.
settle: the best codes of all parts. Whatever is within twice the error of the best score is compared in float64. Where
    that may be more than those kept, or nothing is known of the error, all codes are scanned, each program a portion.
merge: the nearest of those portions.

The centre is the mean of some codes: any vector would be right, but with this one a common offset leaves no rows in
doubt. Subtracting it rounds an element once, relative to the difference.

Parts: x = p (high + low + rest), p a power of two for each row, high and low float16 with 11 bits each. In small
dimensions, where tensor cores wait for the comparisons, three products are taken (low high, high low, high high), in
large ones, where all else waits for them, one. "tf32" and "bf16" permit one anywhere, and the best score is believed,
without a merge.

The error of a score is at most E = a (|z'| R + |z| R') + |z'| R' + b (|z| R + R^2 / 2): R is the largest norm of a
code, z' what high leaves of z, R' the largest norm of what it leaves of a code (all as computed); a = 1 for one
product, and for three 2^-11, what low leaves of z'. b is ``rounding`` of triton_.py:

- Sums. The product of two parts of 11 bits is exact in float32. A tensor core adds n products, four or more, to the sum
  so far at once, cuts each term off below the last bit of the largest, and the result again: n + 2 errors of 2^-23
  |z| R, for each product less than 2^-22. Products with low parts are 2^-10 of the others.
- Elements below 2^-28 of the largest of their row may be lost: sqrt(D) 2^-28 of |z| R for each of the two sides.
- Norms, D 2^-24 R^2 / 2; the centre, and three more float32 operations.
- The last bits of a score hold its step through the codes: 2^-23 for each of STEPS.

Two scores more than 2 E apart are in their true order. This does not hold where R or |z| are so small or so large that
something under- or overflows, or not finite: such rows are in doubt.

The scan takes direct differences in float32, of relative error (D + 2) 2^-24, and float64 where a distance is not
certainly above the least that is known, at first that of the best score's code. So float64, in which no square of a
float32 over- or underflows, decides every comparison, and equal distances take the lowest index. NaN is never less
than anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-12)
#: R^2 / 2 and |z|^2 / 2 between which the error of a score is known.
SMALL, LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
FAR = tl.constexpr(2.0**126)  # above every score of those
NONE = tl.constexpr(0x7FFFFFFF)


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
def _rows(p_x, o_row, m_tile, pitch, D: tl.constexpr, NORMALISED: tl.constexpr, BD: tl.constexpr):
    b_x = tl.load(p_x + o_row[:, None] * pitch + tl.arange(0, BD)[None, :], mask=m_tile, other=0.0)
    b_x = b_x.to(tl.float32)
    return units(b_x) if NORMALISED else b_x


@triton.jit
def _centre(
    p_codebook,
    codes,
    codebook_pitch,
    D: tl.constexpr,
    NORMALISED: tl.constexpr,
    SOME: tl.constexpr,
    BD: tl.constexpr,
):
    """The mean of some codes, as far as they are finite: the same in every program."""
    o_code = tl.arange(0, SOME).to(tl.int64) * codes // SOME
    m_tile = (o_code < codes)[:, None] & (tl.arange(0, BD) < D)[None, :]
    b_codes = _rows(p_codebook, o_code, m_tile, codebook_pitch, D, NORMALISED, BD)
    b_centre = tl.sum(b_codes, 0) / SOME
    return tl.where(tl.abs(b_centre) < float("inf"), b_centre, 0.0)[None, :]


@triton.jit
def _prepare(
    p_x,
    p_unit,
    p_norms,
    p_parts,
    block,
    count,
    stored,
    pitch,
    b_centre,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORMALISED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Of one block; the largest half norm of finite rows, and squared norm of what high parts leave."""
    o_row = block * BK + tl.arange(0, BK)
    o_dim = tl.arange(0, BD)
    m_tile = (o_row < count)[:, None] & (o_dim < D)[None, :]
    b_x = _rows(p_x, o_row.to(tl.int64), m_tile, pitch, D, NORMALISED, BD)
    o_row_wide = o_row[:, None].to(tl.int64)
    if NORMALISED:
        tl.store(p_unit + o_row_wide * D + o_dim[None, :], b_x, mask=m_tile)
    m_stored = o_row < stored
    if PRODUCTS != 0:
        b_x = tl.where(m_tile, b_x - b_centre, 0.0)
    b_largest = tl.max(tl.abs(b_x), 1)
    b_half = 0.5 * tl.sum(b_x * b_x, 1)
    # NaN is in the sum, infinity in the largest.
    m_finite = (o_row < count) & (b_largest < float("inf")) & (b_half == b_half)
    if PRODUCTS == 0:
        if p_norms is not None:
            tl.store(p_norms + o_row, tl.where(m_finite, b_half, float("inf")), mask=m_stored)
        return 0.0, 0.0
    else:
        # A power of two by which the largest element is below 2^15; kept from where powers under- and overflow.
        b_bits = tl.minimum(tl.maximum(b_largest, 2.0**-40), 2.0**40).to(tl.int32, bitcast=True)
        b_bits = (b_bits & 0x7F800000) - (14 << 23)
        b_power = b_bits.to(tl.float32, bitcast=True)
        b_inverse = ((254 << 23) - b_bits).to(tl.float32, bitcast=True)
        b_x = tl.where(m_finite[:, None], b_x * b_inverse[:, None], 0.0)
        b_high = b_x.to(tl.float16)
        b_low = b_x - b_high.to(tl.float32)
        b_left = tl.sum(b_low * b_low, 1) * b_power * b_power
        p_tile = p_parts + o_row_wide * DP + o_dim[None, :]
        m_tile = m_stored[:, None] & (o_dim < DP)[None, :]
        wide = stored.to(tl.int64)
        tl.store(p_tile, b_high, mask=m_tile)
        if PRODUCTS == 3:
            tl.store(p_tile + wide * DP, b_low.to(tl.float16), mask=m_tile)
        tl.store(p_norms + o_row, tl.where(m_finite, tl.minimum(b_half, FAR), FAR), mask=m_stored)
        tl.store(p_norms + wide + o_row, b_power, mask=m_stored)
        tl.store(p_norms + 2 * wide + o_row, b_left, mask=m_stored)
        return tl.max(tl.where(m_finite, b_half, 0.0), 0), tl.max(b_left, 0)


@triton.jit(do_not_specialize=["rows", "codes", "padded", "code_blocks"])
def prepare_kernel(
    p_codebook,
    p_z,
    p_codes,
    p_u,
    p_code_norms,
    p_row_norms,
    p_code_parts,
    p_row_parts,
    p_largest,
    rows,
    codes,
    padded,
    code_blocks,
    z_pitch,
    codebook_pitch,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORMALISED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SOME: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """What a search reads of BK codes, or in programs behind those of codes, of BK vectors.

    NORMALISED, they themselves. With PRODUCTS their float16 parts, and (3, count) float32: half the squared norms, FAR
    where not finite and for codes from ``codes`` to ``padded``; powers; squared norms of what the high parts leave. Of
    the first and the last also the largest of BK codes. Without, half the squared norms of codes, infinite for those.
    """
    program = tl.program_id(0)
    b_centre = None
    if PRODUCTS != 0:
        b_centre = _centre(p_codebook, codes, codebook_pitch, D, NORMALISED, SOME, BD)
    if program < code_blocks:
        half, left = _prepare(
            p_codebook, p_codes, p_code_norms, p_code_parts, program, codes, padded,
            codebook_pitch, b_centre, D, DP, NORMALISED, PRODUCTS, BK, BD,
        )  # fmt: skip
        if PRODUCTS != 0:
            tl.store(p_largest + program, half)
            tl.store(p_largest + code_blocks + program, left)
    elif PRODUCTS != 0 or NORMALISED:
        _prepare(
            p_z, p_u, p_row_norms, p_row_parts, program - code_blocks, rows, rows,
            z_pitch, b_centre, D, DP, NORMALISED, PRODUCTS, BK, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "padded", "steps"])
def propose_kernel(
    p_row_parts,
    p_row_norms,
    p_code_parts,
    p_code_norms,
    p_mask,
    p_score,
    p_code,
    rows,
    padded,
    steps,
    MASKED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    STEPS: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Of BM rows and ``steps`` times BK codes: two codes, their scores, and the least score of others.

    The two have different places in their step: each place keeps its two least scores, and the code of the first.
    """
    part, parts = tl.program_id(1), tl.num_programs(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    m_live = m_row
    if MASKED:
        m_live &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    o_dim, o_lane = tl.arange(0, BD), tl.arange(0, BK)
    b_scale = tl.load(p_row_norms + rows.to(tl.int64) + o_row, mask=m_row, other=0.0)
    p_rows = p_row_parts + tl.minimum(o_row, rows - 1)[:, None] * DP + o_dim[None, :]
    first = part * steps
    last = tl.minimum(first + steps, padded // BK)
    last = tl.where(tl.max(m_live.to(tl.int32), 0) != 0, last, first)
    below_rows, below_codes = rows.to(tl.int64) * DP, padded.to(tl.int64) * DP
    b_best = tl.full([BM, BK], float("inf"), tl.float32)
    b_second = b_best
    for step in range(first, last):
        o_code = step * BK + o_lane
        p_codes = p_code_parts + o_code[:, None].to(tl.int64) * DP + o_dim[None, :]
        b_score = tl.zeros([BM, BK], tl.float32)
        for channel in range(0, DP, BD):
            b_rows = tl.load(p_rows + channel)
            b_codes = tl.load(p_codes + channel).T
            if PRODUCTS == 3:  # what is small first
                b_score = tl.dot(tl.load(p_rows + below_rows + channel), b_codes, b_score)
                b_low = tl.load(p_codes + below_codes + channel).T
                b_score = tl.dot(b_rows, b_low, b_score)
            b_score = tl.dot(b_rows, b_codes, b_score)
        b_score *= tl.load(p_code_norms + padded + o_code)[None, :]
        b_score = tl.load(p_code_norms + o_code)[None, :] - b_score * b_scale[:, None]
        b_bits = (b_score.to(tl.int32, bitcast=True) & -STEPS) | (step - first)
        b_score = b_bits.to(tl.float32, bitcast=True)
        b_second = tl.minimum(b_second, tl.maximum(b_score, b_best))
        b_best = tl.minimum(b_best, b_score)
    p_score += part * rows.to(tl.int64) + o_row
    p_code += part * rows.to(tl.int64) + o_row
    for _ in tl.static_range(2):
        b_least = tl.min(b_best, 1)
        b_lane = tl.min(tl.where(b_best == b_least[:, None], o_lane[None, :], BK), 1)
        b_step = first + (b_least.to(tl.int32, bitcast=True) & (STEPS - 1))
        tl.store(p_score, b_least, mask=m_row)
        tl.store(p_code, b_step * BK + b_lane, mask=m_row)
        p_score += parts * rows
        p_code += parts * rows
        b_best = tl.where(o_lane[None, :] == b_lane[:, None], float("inf"), b_best)
    b_third = tl.min(tl.minimum(b_best, b_second), 1)
    tl.store(p_score, b_third, mask=m_row)


@triton.jit
def _distances(
    p_row, p_codes, o_code, m_code, dim, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):
    """Squared distances of a row, or of rows (BK, 1), to BK codes, in float64.

    ``dim`` is D, of which the compiler must not know: unrolled the loop would take all registers.
    """
    b_sum = tl.zeros([BK, BD], tl.float64)
    for first in range(0, dim, BD):
        o_dim = first + tl.arange(0, BD)
        m_tile = m_code[:, None] & (o_dim < D)[None, :]
        p_tile = p_codes + o_code[:, None].to(tl.int64) * D + o_dim[None, :]
        b_row = tl.load(p_row + o_dim[None, :], mask=(o_dim < D)[None, :], other=0.0)
        b_step = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32).to(tl.float64)
        b_step -= b_row.to(tl.float32).to(tl.float64)
        b_sum += b_step * b_step
    return tl.sum(b_sum, 1)


@triton.jit
def _nearest(b_distance, o_code, m_code, axis: tl.constexpr):
    """The least distance, and the lowest code that has it: infinity and NONE of nothing but NaN."""
    m_code &= b_distance == b_distance
    b_least = tl.min(tl.where(m_code, b_distance, float("inf")), axis, keep_dims=True)
    b_code = tl.where(m_code & (b_distance == b_least), o_code, NONE)
    return tl.min(tl.where(m_code, b_distance, float("inf")), axis), tl.min(b_code, axis)


@triton.jit
def _largest(p_largest, blocks, BLOCK: tl.constexpr):
    """The largest of so many."""
    b_largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        o_block = start + tl.arange(0, BLOCK)
        m_block = o_block < blocks
        b_largest = tl.maximum(b_largest, tl.load(p_largest + o_block, mask=m_block, other=0.0))
    return tl.max(b_largest, 0)


@triton.jit
def _scan(
    p_rows,
    p_codes,
    b_known,
    start,
    end,
    dim,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    TURNS: tl.constexpr,
):
    """The nearest of codes start..end - 1 to each of ROWS rows, and its distance; NONE if that is above ``b_known``."""
    o_lane = tl.arange(0, ROWS)
    o_all = tl.arange(0, BK)
    b_distance = tl.full([ROWS], float("inf"), tl.float64)
    b_code = tl.full([ROWS], NONE, tl.int32)
    while start < end:
        o_code = start + o_all
        m_code = o_code < end
        p_tile = p_codes + o_code[:, None].to(tl.int64) * D
        b_sums = ()
        for _ in tl.static_range(ROWS):
            b_sums = b_sums + (tl.zeros([BK, BD], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        for first in range(0, dim, TURNS * BD):
            for turn in tl.static_range(TURNS):
                o_dim = first + turn * BD + tl.arange(0, BD)
                m_dim = o_dim < D
                m_tile = m_code[:, None] & m_dim[None, :]
                b_codes = tl.load(p_tile + o_dim[None, :], mask=m_tile, other=0.0).to(tl.float32)
                b_next = ()
                for i in tl.static_range(ROWS):
                    b_row = tl.load(p_rows[i] + o_dim, mask=m_dim, other=0.0).to(tl.float32)
                    b_step = b_codes - b_row[None, :]
                    b_next = b_next + (b_sums[i] + b_step * b_step,)  # type: ignore[assignment]  # noqa: RUF005
                b_sums = b_next
        for i in tl.static_range(ROWS):
            # What may be nearer: twice the error, and some for what underflows.
            known = tl.sum(tl.where(o_lane == i, b_known, 0.0), 0)
            limit = (known * (1 + (D + 8) * 2.0**-23)).to(tl.float32) + 2.0**-100
            m_close = m_code & (tl.sum(b_sums[i], 1) <= limit)
            if tl.max(m_close.to(tl.int32), 0) != 0:
                b_exact = _distances(p_rows[i], p_codes, o_code, m_close, dim, D, BK, BD)
                least, code = _nearest(b_exact, o_code, m_close, 0)
                m_this = (o_lane == i) & (
                    (least < b_distance) | ((least == b_distance) & (code < b_code))
                )
                b_distance = tl.where(m_this, least, b_distance)
                b_code = tl.where(m_this, code, b_code)
                b_known = tl.where(m_this, tl.minimum(least, b_known), b_known)
        start += BK
    return b_distance, b_code


@triton.jit(do_not_specialize=["rows", "codes", "parts", "blocks", "portion", "dim"])
def settle_kernel(
    p_z,
    p_codes,
    p_mask,
    p_row_norms,
    p_largest,
    p_score,
    p_code,
    p_index,
    p_doubt,
    p_distance,
    p_nearest,
    rows,
    codes,
    parts,
    blocks,
    portion,
    dim,
    z_pitch,
    linear,
    rounding,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    TURNS: tl.constexpr,
    BL: tl.constexpr,
):
    """The index of rows that are certain, by whichever of the programs (rows, portions of the codes) of BM rows.

    Of rows in doubt each program finds the nearest of its ``portion`` codes. Without EXACT the best score is believed.
    """
    if D <= BD:
        dim = D
    here = tl.program_id(1)
    o_lane = tl.arange(0, BM)
    head = tl.program_id(0).to(tl.int64) * BM
    o_row = head + o_lane
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    o_place = tl.arange(0, 2 * PARTS)
    wide = rows.to(tl.int64)
    m_place = o_place < 2 * parts
    o_tile = o_place[:, None] * wide + o_row[None, :]
    m_tile = m_place[:, None] & m_row[None, :]
    b_score = tl.load(p_score + o_tile, mask=m_tile, other=float("inf"))
    b_code = tl.load(p_code + o_tile, mask=m_tile, other=NONE)
    b_least = tl.min(b_score, 0)
    b_leader = tl.min(tl.where(b_score == b_least[None, :], b_code, NONE), 0)
    b_half = tl.load(p_row_norms + o_row, mask=m_row, other=0.0)
    b_leader = tl.where((b_least < FAR / 2) & (b_half < FAR), b_leader, -1)
    if not EXACT:
        b_index = tl.where(m_row, tl.maximum(b_leader, 0), 0)
        tl.store(p_index + o_row, b_index.to(tl.int64), mask=m_stored)
    else:
        o_third = tl.arange(0, PARTS)
        m_tile = (o_third < parts)[:, None] & m_row[None, :]
        o_tile = (2 * parts + o_third)[:, None] * wide + o_row[None, :]
        b_third = tl.min(tl.load(p_score + o_tile, mask=m_tile, other=float("inf")), 0)
        b_left = tl.load(p_row_norms + 2 * wide + o_row, mask=m_row, other=0.0)
        half = _largest(p_largest, blocks, 128)
        radius, b_norm = tl.sqrt(2 * half), tl.sqrt(2 * b_half)
        radius_left, b_left = tl.sqrt(_largest(p_largest + blocks, blocks, 128)), tl.sqrt(b_left)
        b_error = linear * (b_left * radius + b_norm * radius_left) + b_left * radius_left
        b_error += rounding * (b_norm * radius + half)
        b_limit = b_least + 2.02 * b_error  # and some for the rounding of norms and of this
        half = tl.where(half > SMALL, half, float("inf"))
        m_known = (tl.maximum(half, b_half) < LARGE) & (b_third > b_limit) & (b_leader >= 0)
        m_doubt = tl.where(m_known, False, m_row)
        b_close = tl.sum((b_score <= b_limit[None, :]).to(tl.int32), 0)
        m_close = m_row & m_known & (b_close > 1)
        if here == 0:
            b_index = tl.where(m_row, b_leader, 0).to(tl.int64)
            tl.store(p_index + o_row, b_index, mask=tl.where(m_doubt | m_close, False, m_stored))
            tl.store(p_doubt + o_row, m_doubt, mask=m_stored)
        todo = (m_close & (o_lane % tl.num_programs(1) == here)).to(tl.int32)
        while tl.max(todo, 0) != 0:
            lane = tl.min(tl.where(todo != 0, o_lane, BM), 0)
            todo = tl.where(o_lane == lane, 0, todo)
            row = head + lane
            limit = tl.sum(tl.where(o_lane == lane, b_limit, 0.0), 0)
            o_some = o_place * wide + row
            m_some = tl.load(p_score + o_some, mask=m_place, other=float("inf")) <= limit
            o_code = tl.load(p_code + o_some, mask=m_some, other=0)
            b_exact = _distances(
                p_z + row * z_pitch, p_codes, o_code, m_some, dim, D, 2 * PARTS, BL
            )
            _, code = _nearest(b_exact, o_code, m_some, 0)
            tl.store(p_index + row, code.to(tl.int64))
        todo = m_doubt.to(tl.int32)
        while tl.max(todo, 0) != 0:
            o_pick = tl.arange(0, ROWS)
            b_picked = tl.zeros([ROWS], tl.int64)
            b_first = tl.zeros([ROWS], tl.int32)
            p_rows = ()
            some = tl.min(tl.where(todo != 0, o_lane, BM), 0)
            for i in tl.static_range(ROWS):
                lane = tl.min(tl.where(todo != 0, o_lane, BM), 0)
                lane = tl.where(lane < BM, lane, some)  # again, where there are no more
                todo = tl.where(o_lane == lane, 0, todo)
                leader = tl.sum(tl.where(o_lane == lane, b_leader, 0), 0)
                b_picked = tl.where(o_pick == i, head + lane, b_picked)
                b_first = tl.where(o_pick == i, leader, b_first)
                p_rows = p_rows + (p_z + (head + lane) * z_pitch,)  # type: ignore[assignment]  # noqa: RUF005
            m_first = b_first >= 0
            p_first = p_z + (b_picked * z_pitch)[:, None]
            b_known = _distances(p_first, p_codes, b_first, m_first, dim, D, ROWS, BL)
            b_known = tl.where(m_first & (b_known == b_known), b_known, float("inf"))
            start = here * portion
            end = tl.minimum(start + portion, codes)
            b_distance, b_found = _scan(
                p_rows, p_codes, b_known, start, end, dim, D, ROWS, BK, BD, TURNS
            )
            tl.store(p_distance + here * wide + b_picked, b_distance)
            tl.store(p_nearest + here * wide + b_picked, b_found)


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    p_doubt,
    p_distance,
    p_nearest,
    p_index,
    rows,
    PORTIONS: tl.constexpr,
    BM: tl.constexpr,
):
    """The index of rows in doubt: the nearest of what the portions have."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    m_row &= tl.load(p_doubt + o_row, mask=m_row, other=0) != 0
    o_tile = tl.arange(0, PORTIONS)[:, None] * rows.to(tl.int64) + o_row[None, :]
    b_distance = tl.load(p_distance + o_tile, mask=m_row[None, :], other=0.0)
    b_code = tl.load(p_nearest + o_tile, mask=m_row[None, :], other=NONE)
    _, b_index = _nearest(b_distance, b_code, b_code < NONE, 0)
    tl.store(p_index + o_row, tl.where(b_index < NONE, b_index, 0).to(tl.int64), mask=m_row)
