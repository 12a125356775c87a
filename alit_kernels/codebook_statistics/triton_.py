"""The op's implementation ``triton``: sorts vectors into runs, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import as_rows, launch, next_power_of_2
from . import kernels

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


def tile(dim: int) -> tuple[int, int]:
    """Rows and channels of a step: whole vectors, about 2048 elements."""
    width = next_power_of_2(max(1, dim))
    return max(1, min(CHUNK, 2048 // width)), width


def chunk_sums(
    z: Tensor, run: Runs, *, norm: Tensor | None = None, codes: Tensor | None = None
) -> Tensor:
    """Sum (N // CHUNK + K, D) float64 of each chunk of z (N, D), of z / norm, or with ``codes`` (K, D) of
    code - z / norm. Places without a chunk are not written.
    """
    (rows, dim), num_codes = z.shape, len(run.bounds) - 1
    partial = torch.empty(rows // CHUNK + num_codes, dim, dtype=torch.float64, device=z.device)
    chunk, width = tile(dim)
    launch(
        kernels.sum_chunks_kernel,
        (len(partial) if rows and dim else 0,),
        p_z=z,
        p_norm=norm,
        p_codes=codes,
        p_order=run.order,
        p_bounds=run.bounds,
        p_partial=partial,
        codes=num_codes,
        z_pitch=z.stride(0),
        D=dim,
        DIFFERENCE=codes is not None,
        NORMALISED=norm is not None,
        CHUNK=CHUNK,
        BR=chunk,
        BD=width,
    )
    return partial


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`alit_kernels.codebook_statistics`."""
    z = as_rows(z)
    count = torch.empty(num_codes, dtype=torch.float32, device=z.device)
    total = torch.empty(num_codes, z.shape[1], dtype=torch.float32, device=z.device)
    run = runs(index, num_codes, mask)
    chunk, width = tile(z.shape[1])
    launch(
        kernels.sum_codes_kernel,
        (num_codes,),
        p_partial=chunk_sums(z, run),
        p_bounds=run.bounds,
        p_count=count,
        p_total=total,
        D=z.shape[1],
        CHUNK=CHUNK,
        BR=chunk,
        BD=width,
    )
    return count, total
