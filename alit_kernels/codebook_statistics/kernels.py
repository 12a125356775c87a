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

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import TYPES, as_rows, device_of
from ..aot import Build

CHUNK = 128


class Runs(NamedTuple):
    """Vectors in the order of their codes.

    Attributes:
        order: (N,) int64, the vectors sorted by code, masked ones last.
        bounds: (K + 1,) int32, where each code's run starts and ends in ``order``.
    """

    order: Tensor
    bounds: Tensor


def runs(index: Tensor, num_codes: int, mask: Tensor | None) -> Runs:
    """Sort ``index`` (N,) into runs; where ``mask`` is False a vector is in no run."""
    dtype = torch.int16 if num_codes < 2**15 - 1 else torch.int32
    keys = index.to(dtype)
    if mask is not None:
        keys = torch.where(mask, keys, num_codes)
    keys, order = torch.sort(keys, stable=True)
    codes = torch.arange(num_codes + 1, dtype=dtype, device=index.device)
    return Runs(order, torch.searchsorted(keys, codes, out_int32=True))


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
def _sum_chunks(
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
def _sum_codes(
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


def tile(dim: int) -> tuple[int, int]:
    """Rows and channels of a step: whole vectors, about 2048 elements."""
    width = triton.next_power_of_2(max(1, dim))
    return max(1, min(CHUNK, 2048 // width)), width


def chunk_sums(
    z: Tensor, run: Runs, *, norm: Tensor | None = None, codes: Tensor | None = None
) -> Tensor:
    """Sum (N // CHUNK + K, D) float64 of each chunk of z (N, D), of z / norm, or with ``codes`` (K, D) of
    code - z / norm. Places without a chunk are not written.
    """
    (rows, dim), num_codes = z.shape, len(run.bounds) - 1
    partial = torch.empty(rows // CHUNK + num_codes, dim, dtype=torch.float64, device=z.device)
    if rows and dim:
        _sum_chunks[(len(partial),)](
            z, norm, codes, *run, partial, num_codes, z.stride(0),
            dim, codes is not None, norm is not None, CHUNK, *tile(dim), num_warps=4,
        )  # fmt: skip
    return partial


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`alit_kernels.codebook_statistics`."""
    z = as_rows(z)
    count = torch.empty(num_codes, dtype=torch.float32, device=z.device)
    total = torch.empty(num_codes, z.shape[1], dtype=torch.float32, device=z.device)
    with device_of(z):
        run = runs(index, num_codes, mask)
        partial = chunk_sums(z, run)
        _sum_codes[(num_codes,)](
            partial, run.bounds, count, total, z.shape[1], CHUNK, *tile(z.shape[1])
        )
    return count, total


def builds() -> Iterator[Build]:
    names = ("p_z", "p_norm", "p_codes", "p_order", "p_bounds", "p_partial")
    types = ("*fp32", "*fp32", "*i64", "*i32", "*fp64")
    for dim in (12, 64, 256):
        rows, width = tile(dim)
        shape = {"D": dim, "BR": rows, "BD": width}
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("sum", "difference", "normalised difference"):
                constants: dict[str, object] = {**shape, "CHUNK": CHUNK}
                constants |= {"DIFFERENCE": kind != "sum", "NORMALISED": "normalised" in kind}
                constants |= {"p_codes": None} if kind == "sum" else {}
                constants |= {} if "normalised" in kind else {"p_norm": None}
                yield Build(
                    _sum_chunks,
                    f"{kind} d={dim} {TYPES[dtype]} R{rows}",
                    dict(zip(names, (f"*{TYPES[dtype]}", *types), strict=True))
                    | {"codes": "i32", "z_pitch": "i32"},
                    constants,
                    divisible=tuple(name for name in names if name not in constants)
                    + (("z_pitch",) if dim % 16 == 0 else ()),
                    wide=("p_z",) if dim >= 64 and kind == "sum" else (),
                )
        pointers = {"p_partial": "*fp64", "p_bounds": "*i32"}
        pointers |= {"p_count": "*fp32", "p_total": "*fp32"}
        constants = {**shape, "CHUNK": CHUNK}
        yield Build(_sum_codes, f"d={dim} R{rows}", pointers, constants, divisible=tuple(pointers))
