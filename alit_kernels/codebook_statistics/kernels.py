"""Sums of vectors by code in Triton, without one-hot and without atomics.

Vectors are sorted by code (stable), so that each code owns one run of the order. Runs are cut into chunks of CHUNK
vectors; one kernel sums each chunk, a second the chunks of each code, both in a fixed order: the result does not depend
on the schedule. Sums are in float64, as in the reference: the kernels wait for memory, not for its adders. A code that
owns all vectors is as parallel as a code for each. The sort costs a few passes over N four-byte keys; atomics would
save it and give other bits in every run, and contend where few codes own many vectors. The number of chunks is on the
device; the launch takes its upper bound, and programs beyond return at once.
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
    """Vectors in the order of their codes, cut into chunks.

    Attributes:
        order: (N,) int64, the vectors sorted by code, masked ones last.
        bounds: (K + 1,) int32, where each code's run starts and ends in ``order``.
        chunk_end: (K,) int32, chunks of the codes up to and with this one.
        owner: (P,) int32, the code of each chunk, K beyond the last; P is an upper bound that needs no device value.
    """

    order: Tensor
    bounds: Tensor
    chunk_end: Tensor
    owner: Tensor


def runs(index: Tensor, num_codes: int, mask: Tensor | None) -> Runs:
    """Sort ``index`` (N,) into runs; where ``mask`` is False a vector is in no run."""
    keys = index.to(torch.int32)
    if mask is not None:
        keys = torch.where(mask, keys, num_codes)
    keys, order = torch.sort(keys, stable=True)
    codes = torch.arange(num_codes + 1, dtype=torch.int32, device=index.device)
    bounds = torch.searchsorted(keys, codes, out_int32=True)
    chunks = (bounds.diff() + (CHUNK - 1)) // CHUNK
    chunk_end = chunks.cumsum(0, dtype=torch.int32)
    # A code with n vectors has ceil(n / CHUNK) chunks; codes with vectors are at most N.
    bound = min(len(keys), len(keys) // CHUNK + num_codes)
    places = torch.arange(bound, dtype=torch.int32, device=index.device)
    owner = torch.searchsorted(chunk_end, places, right=True, out_int32=True)
    return Runs(order, bounds, chunk_end, owner)


@triton.jit(do_not_specialize=["codes"])
def _sum_chunks(
    p_z,
    p_norm,
    p_codes,
    p_order,
    p_bounds,
    p_chunk_end,
    p_owner,
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
    place = tl.program_id(0).to(tl.int64)
    code = tl.load(p_owner + place).to(tl.int64)
    if code < codes:
        first = tl.load(p_chunk_end + code - 1, mask=code > 0, other=0)
        start = tl.load(p_bounds + code) + (place.to(tl.int32) - first) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(p_bounds + code + 1))
        o_dim = tl.arange(0, BD)
        m_dim = o_dim < D
        b_sum = tl.zeros([BD], tl.float64)
        if DIFFERENCE:
            b_code = tl.load(p_codes + code * D + o_dim, mask=m_dim, other=0.0)[None, :]
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
        tl.store(p_partial + place * D + o_dim, b_sum, mask=m_dim)


@triton.jit
def sum_of_code(p_partial, p_chunk_end, code, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Sum (BD,) float32 of the chunks of one code, in their order."""
    o_dim = tl.arange(0, BD)
    start = tl.load(p_chunk_end + code - 1, mask=code > 0, other=0)
    end = tl.load(p_chunk_end + code)
    b_sum = tl.zeros([BD], tl.float64)
    for here in range(start, end, BR):
        o_place = here + tl.arange(0, BR)
        m_tile = (o_place < end)[:, None] & (o_dim < D)[None, :]
        p_tile = p_partial + o_place[:, None].to(tl.int64) * D + o_dim[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=m_tile, other=0.0), 0)
    return b_sum.to(tl.float32)


@triton.jit
def _sum_codes(
    p_partial, p_chunk_end, p_total, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    code = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BD)
    b_sum = sum_of_code(p_partial, p_chunk_end, code, D, BR, BD)
    tl.store(p_total + code * D + o_dim, b_sum, mask=o_dim < D)


def tile(dim: int) -> tuple[int, int]:
    """Rows and channels of a step: whole vectors, about 2048 elements."""
    width = triton.next_power_of_2(max(1, dim))
    return max(1, min(CHUNK, 2048 // width)), width


def chunk_sums(
    z: Tensor, run: Runs, num_codes: int, *, norm: Tensor | None = None, codes: Tensor | None = None
) -> Tensor:
    """Sum (P, D) float64 of each chunk of z (N, D), of z / norm, or with ``codes`` (K, D) of code - z / norm."""
    dim = z.shape[1]
    partial = torch.empty(len(run.owner), dim, dtype=torch.float64, device=z.device)
    if len(run.owner) and dim:
        _sum_chunks[(len(run.owner),)](
            z, norm, codes, *run, partial, num_codes, z.stride(0),
            dim, codes is not None, norm is not None, CHUNK, *tile(dim), num_warps=4,
        )  # fmt: skip
    return partial


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`alit_kernels.codebook_statistics`."""
    z = as_rows(z)
    with device_of(z):
        run = runs(index, num_codes, mask)
        total = torch.empty(num_codes, z.shape[1], dtype=torch.float32, device=z.device)
        partial = chunk_sums(z, run, num_codes)
        if z.shape[1]:
            _sum_codes[(num_codes,)](partial, run.chunk_end, total, z.shape[1], *tile(z.shape[1]))
    return run.bounds.diff().float(), total


def builds() -> Iterator[Build]:
    names = (
        "p_z",
        "p_norm",
        "p_codes",
        "p_order",
        "p_bounds",
        "p_chunk_end",
        "p_owner",
        "p_partial",
    )
    types = ("*fp32", "*fp32", "*i64", "*i32", "*i32", "*i32", "*fp64")
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
        yield Build(
            _sum_codes,
            f"d={dim} R{rows}",
            {"p_partial": "*fp64", "p_chunk_end": "*i32", "p_total": "*fp32"},
            shape,
            divisible=("p_partial", "p_chunk_end", "p_total"),
        )
