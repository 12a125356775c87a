"""Sums of vectors by code in Triton, without one-hot and without atomics.

Vectors are sorted by code (stable), so that each code owns one run of the order. Runs are cut into chunks of CHUNK
vectors; one kernel sums each chunk, a second the chunks of each code, both in a fixed order: the result does not depend
on the schedule. Sums are in float64, as in the reference: the kernels wait for memory, not for its adders. A code that
owns all vectors is as parallel as a code for each. The sort costs a few passes over N two-byte keys; atomics would
save it and give other bits in every run, and contend where few codes own many vectors.

The chunks need no count and no prefix sum: those of code k lie from place ``start // CHUNK + k`` on, where its run
starts at ``start``, which leaves room for the last, partial chunk of every code before. That is N / CHUNK + K places,
whatever the runs; the program of a place finds its code by bisection, and has nothing to do where there is no chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code_at(p_bounds, place, codes, CHUNK: tl.constexpr):
    """The last code whose places start at or before ``place``."""
    low = place * 0
    high = low + codes
    while low < high:
        middle = (low + high) // 2
        starts = tl.load(p_bounds + middle) // CHUNK + middle <= place
        low = tl.where(starts, middle + 1, low)
        high = tl.where(starts, high, middle)
    return tl.maximum(low - 1, 0)


@triton.jit(do_not_specialize=["codes"])
def sum_chunks_kernel(
    p_z,
    p_norm,
    p_codes,
    p_order,
    p_bounds,
    p_partial,
    codes,
    z_pitch,
    D: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    NORMALISED: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One chunk: the sum of its rows z, or of code - z (z / norm); p_codes is (K, D) float32."""
    place = tl.program_id(0)
    code = _code_at(p_bounds, place, codes, CHUNK)
    run_start = tl.load(p_bounds + code)
    chunk = place - run_start // CHUNK - code
    start = run_start + chunk * CHUNK
    end = tl.minimum(start + CHUNK, tl.load(p_bounds + code + 1))
    if chunk >= 0 and start < end:
        o_dim = tl.arange(0, BD)
        m_dim = o_dim < D
        b_sum = tl.zeros([BD], tl.float64)
        if DIFFERENCE:
            p_row = p_codes + code.to(tl.int64) * D
            b_code = tl.load(p_row + o_dim, mask=m_dim, other=0.0)[None, :]
        for here in range(start, end, BR):
            o_order = here + tl.arange(0, BR)
            m_row = o_order < end
            o_row = tl.load(p_order + o_order, mask=m_row, other=0)
            m_tile = m_row[:, None] & m_dim[None, :]
            p_tile = p_z + o_row[:, None] * z_pitch + o_dim[None, :]
            b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
            if NORMALISED:
                b_norm = tl.load(p_norm + o_row, mask=m_row, other=1.0)[:, None]
                b_z = tl.div_rn(b_z, tl.broadcast_to(b_norm, b_z.shape))
            if DIFFERENCE:
                b_z = tl.where(m_tile, b_code - b_z, 0.0)
            b_sum += tl.sum(b_z.to(tl.float64), 0)
        tl.store(p_partial + place.to(tl.int64) * D + o_dim, b_sum, mask=m_dim)


@triton.jit
def sum_of_code(
    p_partial, p_bounds, code, D: tl.constexpr, CHUNK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Number of vectors of one code, and the sum (BD,) float32 of its chunks, in their order."""
    o_dim = tl.arange(0, BD)
    run_start = tl.load(p_bounds + code)
    count = tl.load(p_bounds + code + 1) - run_start
    start = run_start // CHUNK + code
    end = start + tl.cdiv(count, CHUNK)
    b_sum = tl.zeros([BD], tl.float64)
    for here in range(start, end, BR):
        o_place = here + tl.arange(0, BR)
        m_tile = (o_place < end)[:, None] & (o_dim < D)[None, :]
        p_tile = p_partial + o_place[:, None].to(tl.int64) * D + o_dim[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=m_tile, other=0.0), 0)
    return count, b_sum.to(tl.float32)


@triton.jit
def sum_codes_kernel(
    p_partial,
    p_bounds,
    p_count,
    p_total,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    code = tl.program_id(0)
    o_dim = tl.arange(0, BD)
    count, b_sum = sum_of_code(p_partial, p_bounds, code, D, CHUNK, BR, BD)
    tl.store(p_count + code, count.to(tl.float32))
    tl.store(p_total + code.to(tl.int64) * D + o_dim, b_sum, mask=o_dim < D)
