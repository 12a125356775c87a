"""Triton search for the nearest codeword, exact whatever the data, without an N x K matrix. Four launches:

prepare: codes and vectors, less a center, in float16 parts, and their norms; under "cosine" normalized first.
propose: scores |c|^2 / 2 - z c on tensor cores. A program has BM vectors and a part of the codebook, so that there are
    programs for the whole chip; it keeps the two best codes of each vector, and of the rest of the part the least score
    in each of four cells.
settle: the codes that were kept. Those within twice the error of the best score are compared: two in float32, and in
    float64 where that does not decide, or where there are more.
scan: the rows in doubt, of which others may be within that limit too, or nothing is known of the error. The cells with
    such others are scanned, each part by a program; the last of them takes the nearest of all.

The center is the mean of some codes: any vector would be right, but with this one a common offset leaves no rows in
doubt. Subtracting it rounds an element once, relative to the difference.

Parts: x = p (high + low + rest), p a power of two for each row, high and low float16 with 11 bits each. In small
dimensions, where tensor cores wait for the comparisons, three products are taken (low high, high low, high high), in
large ones, where all else waits for them, one. "tf32" and "bf16" permit one anywhere, and the best score is believed,
without a scan.

The error of a score is at most E = a (|z'| R + |z| R') + |z'| R' + b (|z| R + R^2 / 2): R is the largest norm of a
code, z' what high leaves of z, R' the largest norm of what it leaves of a code (all as computed); a = 1 for one
product, and for three 2^-11, what low leaves of z'. b is ``rounding`` of triton_.py:

- Sums. The product of two parts of 11 bits is exact in float32. A tensor core adds n products, four or more, to the sum
  so far at once, cuts each term off below the last bit of the largest, and the result again: n + 2 errors of 2^-23
  |z| R, for each product less than 2^-22. Products with low parts are 2^-10 of the others.
- Elements below 2^-28 of the norm of their row may be lost: sqrt(D) 2^-28 of |z| R for each of the two sides.
- Norms, D 2^-24 R^2 / 2; the center, and three more float32 operations.
- The last bits of a score hold its step through the codes: 2^-23 for each of STEPS.

Two scores more than 2 E apart are in their true order. This does not hold where R or |z| are so small or so large that
something under- or overflows, or not finite: such rows are in doubt.

Direct differences in float32 have a relative error of (D + 2) 2^-24. Of distances that are farther apart they tell
which is less; otherwise float64 does, in which no square of a float32 over- or underflows, and equal distances take the
lowest index. NaN is never less than anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distances import CELLS, NONE, above, distance_to, distances, nearer, scan
from .units import EPSILON

#: Bounds for R^2 / 2 and |z|^2 / 2, between which the error of a score is known.
SMALL, LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)
FAR = tl.constexpr(2.0**126)  # above every score whose error is known


@triton.jit
def _center(
    p_codebook,
    codes,
    pitch,
    D: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SOME: tl.constexpr,
    BD: tl.constexpr,
):
    """The mean of some codes, as far as it is finite, NORMALIZED over their mean norm: the same in every program."""
    o_dim = tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    b_square = b_sum
    for i in tl.static_range(SOME):
        p_code = p_codebook + tl.cast(codes, tl.int64) * i // SOME * pitch
        b_code = tl.load(p_code + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
        b_sum += b_code
        b_square += b_code * b_code
    b_center = b_sum / SOME
    if NORMALIZED:
        b_center *= tl.rsqrt(tl.sum(b_square, 0) / SOME)
    return tl.where(tl.abs(b_center) < float("inf"), b_center, 0.0)


@triton.jit
def _sum(b_x):
    """Sum of each row of a tile (LINES, rows, LINE)."""
    return tl.sum(tl.sum(b_x, 0), 1)


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
    NORMALIZED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SOME: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    LINE: tl.constexpr,
):
    """Write what a search reads of BK codes, or in programs behind those of codes, of BK vectors.

    NORMALIZED: unit rows. With PRODUCTS: their float16 parts, and (3, count) float32: half the squared norms, FAR
    where not finite and for codes from ``codes`` to ``padded``; powers; squared norms of what the high parts leave; and
    the largest of BK codes of the first and the last. Without: half the squared norms of codes, then infinite there.

    A tile is (LINES, BK, LINE), channels LINE by LINE: the few threads that have a row in a line have it in all lines,
    and a sum over the row takes few exchanges.
    """
    program = tl.program_id(0)
    of_codes = program < code_blocks
    block = tl.where(of_codes, program, program - code_blocks)
    count = tl.where(of_codes, codes, rows)
    stored = tl.where(of_codes, padded, rows)
    p_x = tl.where(of_codes, p_codebook, p_z)
    pitch = tl.where(of_codes, codebook_pitch, z_pitch)
    p_norms = p_code_norms
    if p_row_norms is not None:
        p_norms = tl.where(of_codes, p_code_norms, p_row_norms)
    LINES: tl.constexpr = BD // LINE
    o_row = block * BK + tl.arange(0, BK)
    o_dim = (tl.arange(0, LINES) * LINE)[:, None, None] + tl.arange(0, LINE)[None, None, :]
    if (
        PRODUCTS != 0
    ):  # before the tile, to which it is given: the compiler lays both out as the last is loaded
        b_center = _center(p_codebook, codes, codebook_pitch, D, NORMALIZED, SOME, BD)
        b_center = tl.reshape(b_center, [LINES, 1, LINE])
    # Rows beyond the last are the last again.
    o_read = tl.minimum(o_row, count - 1)[None, :, None].to(tl.int64)
    if BD > D:
        b_x = tl.load(p_x + o_read * pitch + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
    else:
        b_x = tl.load(p_x + o_read * pitch + o_dim).to(tl.float32)
    if NORMALIZED:
        b_wide = b_x.to(tl.float64)
        b_norm = tl.maximum(tl.sqrt(_sum(b_wide * b_wide)), EPSILON)
        b_x = (b_wide * (1.0 / b_norm)[None, :, None]).to(tl.float32)
        p_unit = tl.where(of_codes, p_codes, p_u) + o_read * D + o_dim
        tl.store(p_unit, b_x, mask=o_dim < D)
    if PRODUCTS != 0:
        b_x -= b_center
    b_half = 0.5 * _sum(b_x * b_x)
    m_real = o_row < count
    m_finite = b_half < float("inf")  # and not NaN
    if PRODUCTS == 0:
        if of_codes:
            m_finite &= m_real
            tl.store(p_norms + o_row, tl.where(m_finite, b_half, float("inf")), mask=o_row < stored)
    else:
        b_counted = b_half
        if tl.min(m_finite.to(tl.int32), 0) == 0:
            # NaN and infinity count as nothing, squares that overflow as infinity.
            m_infinite = tl.max(tl.max(tl.abs(b_x), 0), 1) == float("inf")
            b_counted = tl.where(m_infinite | (b_half != b_half), 0.0, b_half)
            b_x = tl.where(m_finite[None, :, None], b_x, 0.0)
        # A power of two by which the norm is below 2^15; kept from where powers under- and overflow.
        b_bits = tl.minimum(tl.maximum(tl.sqrt(2 * b_half), 2.0**-60), 2.0**60)
        b_bits = (b_bits.to(tl.int32, bitcast=True) & 0x7F800000) - (14 << 23)
        b_power = b_bits.to(tl.float32, bitcast=True)
        b_x *= ((254 << 23) - b_bits).to(tl.float32, bitcast=True)[None, :, None]
        b_high = b_x.to(tl.float16)
        b_low = b_x - b_high.to(tl.float32)
        b_left = _sum(b_low * b_low) * b_power * b_power
        m_tile = (o_row < stored)[None, :, None] & (o_dim < DP)
        p_tile = tl.where(of_codes, p_code_parts, p_row_parts)
        p_tile += o_row[None, :, None].to(tl.int64) * DP + o_dim
        wide = stored.to(tl.int64)
        tl.store(p_tile, b_high, mask=m_tile)
        if PRODUCTS == 3:
            tl.store(p_tile + wide * DP, b_low.to(tl.float16), mask=m_tile)
        m_stored = o_row < stored
        m_finite &= m_real
        tl.store(p_norms + o_row, tl.where(m_finite, tl.minimum(b_half, FAR), FAR), mask=m_stored)
        tl.store(p_norms + wide + o_row, b_power, mask=m_stored)
        tl.store(p_norms + 2 * wide + o_row, b_left, mask=m_stored)
        if of_codes:
            tl.store(p_largest + program, tl.max(b_counted, 0))
            tl.store(p_largest + code_blocks + program, tl.max(b_left, 0))


@triton.jit(do_not_specialize=["rows", "padded", "steps"])
def propose_kernel(
    p_row_parts,
    p_row_norms,
    p_code_parts,
    p_code_norms,
    p_mask,
    p_score,
    p_code,
    p_others,
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
    """Propose two codes, with scores, to BM rows among ``steps`` times BK codes; write each cell's least other score.

    The two are of different columns of a BK-wide step: a column keeps its two least scores, and the code of the first.
    """
    padded = padded // BK * BK  # shows the compiler that it is a multiple
    part = tl.program_id(1)
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = o_row < rows
    m_live = m_row
    if MASKED:
        m_live &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    o_dim, o_lane = tl.arange(0, BD), tl.arange(0, BK)
    b_scale = tl.load(p_row_norms + rows.to(tl.int64) + o_row, mask=m_row, other=0.0)
    o_read = tl.minimum(o_row, rows - 1).to(tl.int64)
    p_rows = p_row_parts + o_read[:, None] * DP + o_dim[None, :]
    first = part * steps
    last = tl.minimum(first + steps, padded // BK)
    last = tl.where(tl.max(m_live.to(tl.int32), 0) != 0, last, first)
    below_rows, below_codes = rows.to(tl.int64) * DP, padded.to(tl.int64) * DP
    # In 64 bits the compiler sees that the addresses of a thread are constants apart.
    o_code = o_lane.to(tl.int64)
    o_tile = o_code[:, None] * DP + o_dim[None, :]
    b_best = tl.full([BM, BK], float("inf"), tl.float32)
    b_second = b_best
    for step in range(0, last - first):
        start = (first + step).to(tl.int64) * BK
        p_codes = p_code_parts + start * DP + o_tile
        p_norms = p_code_norms + start + o_code
        b_score = tl.zeros([BM, BK], tl.float32)
        for channel in range(0, DP, BD):
            b_rows = tl.load(p_rows + channel)
            b_codes = tl.load(p_codes + channel).T
            if PRODUCTS == 3:  # small products first
                b_score = tl.dot(tl.load(p_rows + below_rows + channel), b_codes, b_score)
                b_low = tl.load(p_codes + below_codes + channel).T
                b_score = tl.dot(b_rows, b_low, b_score)
            b_score = tl.dot(b_rows, b_codes, b_score)
        b_score *= tl.load(p_norms + padded)[None, :]
        b_score = tl.load(p_norms)[None, :] - b_score * b_scale[:, None]
        b_bits = (b_score.to(tl.int32, bitcast=True) & -STEPS) | step
        b_score = b_bits.to(tl.float32, bitcast=True)
        b_second = tl.minimum(b_second, tl.maximum(b_score, b_best))
        b_best = tl.minimum(b_best, b_score)
    p_score += 2 * part * rows.to(tl.int64) + o_row
    p_code += 2 * part * rows.to(tl.int64) + o_row
    for _ in tl.static_range(2):
        b_least = tl.min(b_best, 1)
        b_lane = tl.min(tl.where(b_best == b_least[:, None], o_lane[None, :], BK), 1)
        b_step = first + (b_least.to(tl.int32, bitcast=True) & (STEPS - 1))
        tl.store(p_score, b_least, mask=m_row)
        tl.store(p_code, b_step * BK + b_lane, mask=m_row)
        p_score += rows
        p_code += rows
        b_best = tl.where(o_lane[None, :] == b_lane[:, None], float("inf"), b_best)
    b_others = tl.reshape(tl.minimum(b_best, b_second), [BM, BK // (2 * CELLS), CELLS, 2])
    b_others = tl.min(tl.min(b_others, 3), 1)
    o_cell = part * CELLS + tl.arange(0, CELLS)
    p_others += o_cell[None, :] * rows.to(tl.int64) + o_row[:, None]
    tl.store(p_others, b_others, mask=m_row[:, None])


@triton.jit
def _largest(p_largest, blocks, BLOCK: tl.constexpr):
    """Largest of ``blocks`` numbers of at least 0; NaN counts as above all."""
    b_largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, blocks, BLOCK):
        o_block = start + tl.arange(0, BLOCK)
        b_next = tl.load(p_largest + o_block, mask=o_block < blocks, other=0.0)
        b_largest = tl.maximum(b_largest, b_next.to(tl.int32, bitcast=True))
    return tl.max(b_largest, 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "parts", "blocks", "dim"])
def settle_kernel(
    p_z,
    p_codes,
    p_mask,
    p_row_norms,
    p_largest,
    p_score,
    p_code,
    p_others,
    p_index,
    p_limit,
    p_scanned,
    rows,
    parts,
    blocks,
    dim,
    z_pitch,
    linear,
    rounding,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the nearest of the codes that were kept, which is the nearest of all but for rows in doubt: theirs may be
    NONE, and they get a limit of scores, others -inf. The counter of ``scan_kernel`` begins with 0, or with -1 where
    that has nothing to do. Without EXACT the best score is believed.
    """
    if D <= BD:
        dim = D
    block = tl.program_id(0)
    o_lane = tl.arange(0, BM)
    o_row = block * BM + o_lane
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_stored, other=0) != 0
    wide = rows.to(tl.int64)
    # Three scores, the codes of two, and the least score of codes that were not kept.
    b_first = tl.full([BM], float("inf"), tl.float32)
    b_second, b_third, b_others = b_first, b_first, b_first
    b_leader = tl.full([BM], -1, tl.int32)
    b_rival = b_leader
    p_first, p_codes_kept, p_cell = p_score + o_row, p_code + o_row, p_others + o_row
    for _ in range(parts):
        for _ in tl.static_range(2):
            b_score = tl.load(p_first, mask=m_row, other=float("inf"))
            b_code = tl.load(p_codes_kept, mask=m_row, other=-1)
            m_first, m_second = b_score < b_first, b_score < b_second
            b_rival = tl.where(m_first, b_leader, tl.where(m_second, b_code, b_rival))
            b_leader = tl.where(m_first, b_code, b_leader)
            b_third = tl.minimum(b_third, tl.maximum(b_score, b_second))
            b_second = tl.minimum(b_second, tl.maximum(b_score, b_first))
            b_first = tl.minimum(b_first, b_score)
            p_first += wide
            p_codes_kept += wide
        if EXACT:
            for _ in tl.static_range(CELLS):
                b_cell = tl.load(p_cell, mask=m_row, other=float("inf"))
                b_others = tl.minimum(b_others, b_cell)
                p_cell += wide
    b_half = tl.load(p_row_norms + o_row, mask=m_row, other=FAR)
    m_known = (b_first < FAR / 2) & (b_half < FAR)
    b_leader = tl.where(m_known, b_leader, 0)
    if not EXACT:
        tl.store(p_index + o_row, b_leader.to(tl.int64), mask=m_stored)
    else:
        b_left = tl.load(p_row_norms + 2 * wide + o_row, mask=m_row, other=0.0)
        half = _largest(p_largest, blocks, 32)
        radius, b_norm = tl.sqrt(2 * half), tl.sqrt(2 * b_half)
        radius_left, b_left = tl.sqrt(_largest(p_largest + blocks, blocks, 32)), tl.sqrt(b_left)
        b_error = linear * (b_left * radius + b_norm * radius_left) + b_left * radius_left
        b_error += rounding * (b_norm * radius + half)
        b_limit = b_first + 2.02 * b_error  # 2.02: some for the rounding of norms and of this sum
        half = tl.where(half > SMALL, half, float("inf"))
        m_known &= (tl.maximum(half, b_half) < LARGE) & (b_limit < FAR / 2)
        m_doubt = m_row & ~(m_known & (b_others > b_limit))
        b_of_doubt = tl.where(m_known, b_limit, float("inf"))
        tl.store(p_limit + o_row, tl.where(m_doubt, b_of_doubt, float("-inf")), mask=m_stored)
        tl.store(p_scanned + block, tl.max(m_doubt.to(tl.int32), 0) - 1)
        b_limit = tl.where(m_known, b_limit, float("-inf"))
        m_many = m_row & (m_doubt | (b_third <= b_limit))
        many = m_many.to(tl.int32)
        m_two = m_row & ~m_many & (b_second <= b_limit)
        two = m_two.to(tl.int32)
        tl.store(p_index + o_row, b_leader.to(tl.int64), mask=m_stored & ~(m_many | m_two))
        while tl.max(two, 0) != 0:
            lane = tl.min(tl.where(two != 0, o_lane, BM), 0)
            two = tl.where(o_lane == lane, 0, two)
            row = (block * BM + lane).to(tl.int64)
            leader = tl.max(tl.where(o_lane == lane, b_leader, -1), 0)
            rival = tl.max(tl.where(o_lane == lane, b_rival, -1), 0)
            near = distance_to(p_z + row * z_pitch, p_codes, leader, dim, D, BD, tl.float32)
            far = distance_to(p_z + row * z_pitch, p_codes, rival, dim, D, BD, tl.float32)
            tl.store(p_index + row, tl.where(far < near, rival, leader).to(tl.int64))
            clear = tl.maximum(near, far) > above(tl.minimum(near, far), D)
            many = tl.where(o_lane == lane, tl.where(clear, 0, 1), many)
        while tl.max(many, 0) != 0:
            lane = tl.min(tl.where(many != 0, o_lane, BM), 0)
            many = tl.where(o_lane == lane, 0, many)
            row = (block * BM + lane).to(tl.int64)
            limit = tl.max(tl.where(o_lane == lane, b_limit, float("-inf")), 0)
            least, nearest = tl.cast(float("inf"), tl.float64), tl.cast(NONE, tl.int32)
            p_place, p_kept = p_score + row, p_code + row
            # No kept code counts for a row of which nothing is known: its scores may be anything.
            for _ in range(0, tl.where(limit > float("-inf"), 2 * parts, 0)):
                if tl.load(p_place) <= limit:
                    code = tl.load(p_kept)
                    distance = distance_to(p_z + row * z_pitch, p_codes, code, dim, D, BD)
                    least, nearest = nearer(distance, code, least, nearest)
                p_place += wide
                p_kept += wide
            tl.store(p_index + row, nearest.to(tl.int64))


@triton.jit(do_not_specialize=["rows", "codes", "size", "dim"])
def scan_kernel(
    p_z,
    p_codes,
    p_others,
    p_limit,
    p_scanned,
    p_distance,
    p_nearest,
    p_index,
    rows,
    codes,
    size,
    dim,
    z_pitch,
    D: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    SOME: tl.constexpr,
    BL: tl.constexpr,
):
    """Write indices of the rows in doubt among BM: each program scans the cells of a part of the codebook that may
    have a nearer code than the one that is known, and the last of them takes the nearest.
    """
    if D <= BD:
        dim = D
    block, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if tl.load(p_scanned + block) < 0:
        return
    o_lane = tl.arange(0, BM)
    o_row = block * BM + o_lane
    m_row = o_row < rows
    wide = rows.to(tl.int64)
    b_limit = tl.load(p_limit + o_row, mask=m_row, other=float("-inf"))
    m_row &= b_limit > float("-inf")
    b_cells = tl.zeros([BM], tl.int32)  # a bit for each cell that is to be scanned
    p_cell = p_others + part * CELLS * wide + o_row
    for i in tl.static_range(CELLS):
        b_cell = tl.load(p_cell + i * wide, mask=m_row, other=0.0)
        b_cells |= tl.where(b_cell > b_limit, 0, 1 << i)
    b_cells = tl.where(m_row, b_cells, 0)
    p_distance += part * wide
    p_nearest += part * wide
    tl.store(p_nearest + o_row, NONE, mask=m_row & (b_cells == 0))
    tl.store(p_distance + o_row, float("inf"), mask=m_row & (b_cells == 0))
    todo = b_cells
    while tl.max(todo, 0) != 0:
        lane = tl.min(tl.where(todo != 0, o_lane, BM), 0)
        cells = tl.max(tl.where(o_lane == lane, todo, 0), 0)
        todo = tl.where(o_lane == lane, 0, todo)
        row = (block * BM + lane).to(tl.int64)
        p_row = p_z + row * z_pitch
        # As in the scan, so that distances to equal codes are equal: sums in another order may differ.
        nearest = tl.load(p_index + row).to(tl.int32)
        least = tl.cast(float("inf"), tl.float64)
        if nearest < NONE:
            o_known = nearest + tl.zeros([SOME], tl.int32)
            b_known = distances(p_row, p_codes, o_known, o_known >= 0, dim, D, SOME, BL)
            least = tl.min(b_known, 0)
        for cell in range(0, CELLS):
            if (cells >> cell) % 2 != 0:
                least, nearest = scan(
                    p_row, p_codes, part * CELLS * size + 2 * cell, least, nearest, size, codes, dim,
                    D, BK, BD, SOME, BL,
                )  # fmt: skip
        tl.store(p_distance + row, least)
        tl.store(p_nearest + row, nearest)
    tl.debug_barrier()
    if tl.atomic_add(p_scanned + block, 1) == parts - 1:
        b_least = tl.full([BM], float("inf"), tl.float64)
        b_nearest = tl.full([BM], NONE, tl.int32)
        for other in range(0, parts):
            o_found = (other - part) * wide + o_row
            b_distance = tl.load(p_distance + o_found, mask=m_row, other=float("inf"))
            b_code = tl.load(p_nearest + o_found, mask=m_row, other=NONE)
            b_least, b_nearest = nearer(b_distance, b_code, b_least, b_nearest)
        b_nearest = tl.where(b_nearest < NONE, b_nearest, 0)
        tl.store(p_index + o_row, b_nearest.to(tl.int64), mask=m_row)
