"""Exact comparisons of the search: direct differences of a row from codes, in float32 and float64."""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0x7FFFFFFF)
#: Cells in a part: cell i has codes 2 i and 2 i + 1 of every eight, which are in the same threads of a product.
CELLS = tl.constexpr(4)


@triton.jit
def _steps(p_row, p_codes, o_code, m_code, o_dim, D: tl.constexpr, TYPE: tl.constexpr):
    """Differences (BK, BD) of a row from codes, in some channels."""
    m_dim = (o_dim < D)[None, :]
    p_tile = p_codes + o_code[:, None].to(tl.int64) * D + o_dim[None, :]
    b_codes = tl.load(p_tile, mask=m_code[:, None] & m_dim, other=0.0).to(tl.float32).to(TYPE)
    b_row = tl.load(p_row + o_dim[None, :], mask=m_dim, other=0.0).to(tl.float32).to(TYPE)
    return b_codes - b_row


@triton.jit
def distances(
    p_row,
    p_codes,
    o_code,
    m_code,
    dim,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    TYPE: tl.constexpr = tl.float64,
):
    """Squared distances of a row to BK codes.

    ``dim`` is D, of which the compiler must not know: unrolled the loop would take all registers.
    """
    b_sum = tl.zeros([BK, BD], TYPE)
    for first in range(0, dim, BD):
        b_step = _steps(p_row, p_codes, o_code, m_code, first + tl.arange(0, BD), D, TYPE)
        b_sum += b_step * b_step
    return tl.sum(b_sum, 1)


@triton.jit
def distance_to(
    p_row, p_codes, code, dim, D: tl.constexpr, BD: tl.constexpr, TYPE: tl.constexpr = tl.float64
):
    """Squared distance of a row to one code."""
    b_code = code + tl.arange(0, 1)
    return tl.sum(distances(p_row, p_codes, b_code, b_code >= 0, dim, D, 1, BD, TYPE), 0)


@triton.jit
def above(least, D: tl.constexpr):
    """Float32 distance above which no code is as near as ``least``: twice its error, and some for underflow."""
    return (least * (1 + (D + 8) * 2.0**-23)).to(tl.float32) + 2.0**-100


@triton.jit
def nearer(distance, code, least, nearest):
    """Lesser of two distances and its code, the lower code if they are equal; a NaN ``distance`` never wins."""
    m_less = (distance < least) | ((distance == least) & (code < nearest))
    return tl.where(m_less, distance, least), tl.where(m_less, code, nearest)


@triton.jit
def _of_cell(code, start, size, codes, BK: tl.constexpr):
    """BK of the ``size`` codes of the cell that begins with ``code``, from its ``start``-th on; and their mask."""
    o_place = start + tl.arange(0, BK)
    o_code = code + o_place // 2 * (2 * CELLS) + o_place % 2
    return o_code, (o_place < size) & (o_code < codes)


@triton.jit
def scan(
    p_row,
    p_codes,
    code,
    least,
    nearest,
    size,
    codes,
    dim,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    SOME: tl.constexpr,
    BL: tl.constexpr,
):
    """Least of the distance ``least`` and those to the codes of a cell that begins with ``code``, and its code."""
    for start in range(0, size, BK):
        o_code, m_code = _of_cell(code, start, size, codes, BK)
        b_near = distances(p_row, p_codes, o_code, m_code, dim, D, BK, BD, tl.float32)
        b_close = tl.where(m_code & (b_near <= above(least, D)), tl.arange(0, BK), BK)
        first = tl.min(b_close, 0)
        while first < BK:  # SOME codes, one of which is close
            first -= first % SOME
            o_some, m_some = _of_cell(code, start + first, size, codes, SOME)
            b_exact = distances(p_row, p_codes, o_some, m_some, dim, D, SOME, BL)
            m_some &= b_exact == b_exact
            b_exact = tl.where(m_some, b_exact, float("inf"))
            distance = tl.min(b_exact, 0)
            lowest = tl.min(tl.where(m_some & (b_exact == distance), o_some, NONE), 0)
            least, nearest = nearer(distance, lowest, least, nearest)
            b_close = tl.where(b_close < first + SOME, BK, b_close)
            first = tl.min(b_close, 0)
    return least, nearest
