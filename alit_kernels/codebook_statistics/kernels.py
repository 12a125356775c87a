"""Sums of vectors by code in Triton: two launches, without one-hot matrices, sorts of all rows or atomics.

KB neighboring codes are a group. The first kernel puts the rows of each block of BN in the order of their groups, by
counting for each how many come before it, and writes where each group's rows start and end: a (blocks, groups) table.
In the second a program takes a group: its rows are some of every block, in the order of the blocks, and a step of BR of
them is found by comparing its places with the running number of rows. A vector is read once, and no order depends on
the schedule. Sums are in float64, as in the reference: the kernels wait for memory, not for its adders.

Where LONG or more rows of a block are of one group, the first kernel also sums them, and the second takes that sum: at
most N LONG / BN rows are left to one program, however many vectors a code owns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..nearest_codeword.units import units


@triton.jit
def _add_rows(
    b_sum,
    b_count,
    o_row,
    m_row,
    group,
    p_index,
    p_z,
    p_codes,
    z_pitch,
    codes_pitch,
    D: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    KB: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums (KB, BR, BD) float64 and counts (KB, BR), with each row z added to the sum of its code, and 1 to its count;
    or code - z, both normalized or as they are, added to the sums alone.
    """
    o_dim = tl.arange(0, BD)
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    b_code = tl.load(p_index + o_row, mask=m_row, other=0).to(tl.int64)
    p_tile = p_z + o_row[:, None] * z_pitch + o_dim[None, :]
    b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    if NORMALIZED:
        b_z = units(b_z)
    if DIFFERENCE:
        p_tile = p_codes + b_code[:, None] * codes_pitch + o_dim[None, :]
        b_q = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_z = (units(b_q) if NORMALIZED else b_q) - b_z
    o_code = (group * KB + tl.arange(0, KB)).to(tl.int64)
    m_mine = m_row[None, :] & (b_code[None, :] == o_code[:, None])
    b_sum += tl.where(m_mine[:, :, None], b_z.to(tl.float64)[None, :, :], 0.0)
    return b_sum, b_count if DIFFERENCE else b_count + m_mine.to(tl.int32)


@triton.jit
def _keys(
    p_index, p_mask, p_order, block, o_n, rows, codes, groups,
    MASKED: tl.constexpr, KB: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Keys ``group * BN + row`` of the rows ``o_n`` of a block; rows that do not count have the group ``groups``."""
    o_row = block * BN + o_n
    m_row = o_row < rows
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    b_code = tl.load(p_index + o_row, mask=m_row, other=-1)
    m_row &= (b_code >= 0) & (b_code < codes)
    return tl.where(m_row, b_code // KB, groups).to(p_order.dtype.element_ty) * BN + o_n


@triton.jit(do_not_specialize=["rows", "codes", "groups"])
def order_kernel(
    p_index,
    p_mask,
    p_z,
    p_codes,
    p_order,
    p_table,
    p_partial,
    p_taking,
    rows,
    codes,
    groups,
    z_pitch,
    codes_pitch,
    D: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    MASKED: tl.constexpr,
    LONG: tl.constexpr,
    KB: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the keys ``group * BN + row of the block`` of one block in ascending order; row ``block`` of the table
    (blocks, groups, 2): first and end of each group in that order; the sums and counts (KB, D + 1) of long groups, at
    ``first // LONG`` of the block; the number of rows of the block that take part.
    """
    block = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BN)
    b_key = _keys(p_index, p_mask, p_order, block, o_n, rows, codes, groups, MASKED, KB, BN)
    b_rank = tl.zeros([BN], tl.int32)
    for start in range(0, BN, BC):
        o_other = start + tl.arange(0, BC)
        b_other = _keys(
            p_index, p_mask, p_order, block, o_other, rows, codes, groups, MASKED, KB, BN
        )
        b_rank += tl.sum((b_other[:, None] < b_key[None, :]).to(tl.int32), 0)
    p_order += block * BN
    tl.store(p_order + b_rank, b_key)
    tl.store(p_taking + block, tl.sum((b_key < groups * BN).to(tl.int32), 0))
    p_table += block * groups * 2
    for start in range(0, 2 * groups, BN):
        tl.store(p_table + start + o_n, tl.zeros([BN], tl.int16), mask=start + o_n < 2 * groups)
    tl.debug_barrier()  # other threads stored what is read below
    b_group = tl.load(p_order + o_n) // BN
    b_before = tl.load(p_order + o_n - 1, mask=o_n > 0, other=-BN) // BN
    b_behind = tl.load(p_order + o_n + 1, mask=o_n + 1 < BN, other=-BN) // BN
    b_far = tl.load(p_order + o_n + LONG - 1, mask=o_n + LONG <= BN, other=-BN) // BN
    m_own = b_group < groups
    m_first = m_own & (b_group != b_before)
    p_entry = p_table + b_group.to(tl.int64) * 2
    tl.store(p_entry, o_n.to(tl.int16), mask=m_first)
    tl.store(p_entry + 1, (o_n + 1).to(tl.int16), mask=m_own & (b_group != b_behind))
    m_long = m_first & (b_far == b_group)
    o_k, o_r, o_dim = tl.arange(0, KB), tl.arange(0, BR), tl.arange(0, BD)
    for _ in range(tl.sum(m_long.to(tl.int32), 0)):
        first = tl.min(tl.where(m_long, o_n, BN), 0)
        m_long &= o_n > first
        group = tl.sum(tl.where(o_n == first, b_group, 0), 0)
        end = first + tl.sum((b_group == group).to(tl.int32), 0)
        b_sum = tl.zeros([KB, BR, BD], tl.float64)
        b_count = tl.zeros([KB, BR], tl.int32)
        for here in range(first, end, BR):
            m_here = here + o_r < end
            b_here = tl.load(p_order + here + o_r, mask=m_here, other=0) % BN
            b_sum, b_count = _add_rows(
                b_sum, b_count, block * BN + b_here, m_here, group, p_index, p_z, p_codes, z_pitch, codes_pitch,
                D, DIFFERENCE, NORMALIZED, KB, BD,
            )  # fmt: skip
        slot = block * (BN // LONG) + first // LONG
        o_sum = (slot * KB + o_k) * (D + 1)
        m_sum = (o_k[:, None] >= 0) & (o_dim < D)[None, :]
        tl.store(p_partial + o_sum[:, None] + o_dim[None, :], tl.sum(b_sum, 1), mask=m_sum)
        tl.store(p_partial + o_sum + D, tl.sum(b_count, 1).to(tl.float64))


@triton.jit
def _listed(b_number, b_offset, o):
    """Place of the ``o``-th element of lists, one behind the other, of ``number`` places from ``offset`` on each."""
    b_end = tl.cumsum(b_number, 0)
    m_in = (o[:, None] < b_end[None, :]) & (o[:, None] >= (b_end - b_number)[None, :])
    return o + tl.sum(tl.where(m_in, (b_offset + b_number - b_end)[None, :], 0), 1)


@triton.jit
def sum_of_group(
    group,
    p_index,
    p_z,
    p_codes,
    p_order,
    p_table,
    p_partial,
    blocks,
    groups,
    z_pitch,
    codes_pitch,
    D: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    LONG: tl.constexpr,
    KB: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Counts (KB,) int32 of a group's codes, and the sums (KB, BD) of their vectors, rounded to float32; of differences
    the sums alone.
    """
    o_k, o_t, o_r, o_dim = (
        tl.arange(0, KB),
        tl.arange(0, BT),
        tl.arange(0, BR),
        tl.arange(0, BD),
    )
    b_sum = tl.zeros([KB, BR, BD], tl.float64)
    b_count = tl.zeros([KB, BR], tl.int32)
    first_row = tl.full([], 0, tl.int64)
    for first_block in range(0, blocks, BT):
        m_block = first_block + o_t < blocks
        p_entry = p_table + ((first_block + o_t).to(tl.int64) * groups + group) * 2
        b_first = tl.load(p_entry, mask=m_block, other=0).to(tl.int32)
        b_number = tl.load(p_entry + 1, mask=m_block, other=0).to(tl.int32) - b_first
        b_long = (b_number >= LONG).to(tl.int32)
        b_number *= 1 - b_long
        for here in range(0, tl.sum(b_number, 0), BR):
            m_here = here + o_r < tl.sum(b_number, 0)
            o_place = _listed(b_number, o_t * BN + b_first, here + o_r)
            b_key = tl.load(p_order + first_row + o_place, mask=m_here, other=0)
            o_row = first_row + (o_place // BN) * BN + b_key % BN
            b_sum, b_count = _add_rows(
                b_sum, b_count, o_row, m_here, group, p_index, p_z, p_codes, z_pitch, codes_pitch,
                D, DIFFERENCE, NORMALIZED, KB, BD,
            )  # fmt: skip
        for here in range(0, tl.sum(b_long, 0), BR):
            m_here = here + o_r < tl.sum(b_long, 0)
            o_place = _listed(b_long, o_t * (BN // LONG) + b_first // LONG, here + o_r)
            o_slot = first_row // LONG + o_place
            o_sum = (o_slot[None, :] * KB + o_k[:, None]) * (D + 1)
            m_sum = m_here[None, :] & (o_k[:, None] >= 0)
            m_tile = m_sum[:, :, None] & (o_dim < D)[None, None, :]
            p_tile = p_partial + o_sum[:, :, None] + o_dim[None, None, :]
            b_sum += tl.load(p_tile, mask=m_tile, other=0.0)
            if not DIFFERENCE:
                b_count += tl.load(p_partial + o_sum + D, mask=m_sum, other=0.0).to(tl.int32)
        first_row += BT * BN
    return tl.sum(b_count, 1), tl.sum(b_sum, 1).to(tl.float32)


@triton.jit(do_not_specialize=["blocks", "codes", "groups"])
def sums_kernel(
    p_index,
    p_z,
    p_order,
    p_table,
    p_partial,
    p_count,
    p_total,
    blocks,
    codes,
    groups,
    z_pitch,
    D: tl.constexpr,
    LONG: tl.constexpr,
    KB: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write count and total of a group's codes."""
    group = tl.program_id(0)
    b_count, b_sum = sum_of_group(
        group, p_index, p_z, p_z, p_order, p_table, p_partial, blocks, groups, z_pitch, 0,
        D, False, False, LONG, KB, BN, BT, BR, BD,
    )  # fmt: skip
    o_code, o_dim = group * KB + tl.arange(0, KB), tl.arange(0, BD)
    m_code = o_code < codes
    tl.store(p_count + o_code, b_count.to(tl.float32), mask=m_code)
    p_tile = p_total + o_code[:, None].to(tl.int64) * D + o_dim[None, :]
    tl.store(p_tile, b_sum, mask=m_code[:, None] & (o_dim < D)[None, :])
