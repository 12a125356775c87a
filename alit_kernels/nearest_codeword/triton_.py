"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from .._vectors import unit
from . import kernels

#: The largest D whose rows stay in registers, and that is searched by differences alone.
UNROLLED = 16
NORMS = 64  # codes of a program of norms
LANES = 128  # codes side by side: one for each thread, so that no code passes through shared memory


class Tile(NamedTuple):
    """Rows of a program, codes of a thread, and whether the rows stay in registers (D unrolled)."""

    rows: int
    codes: int
    unrolled: bool


def tile(dim: int) -> Tile:
    """Launch table of the direct search. Up to D = 16 all of z stays in registers; beyond, it streams through L1."""
    if dim <= 4:
        return Tile(4, 1, True)  # eight rows spill on sm_80
    return Tile(8, 1, True) if dim <= UNROLLED else Tile(8, 2, False)


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """See :func:`alit_kernels.nearest_codeword`."""
    if metric == "cosine":
        z, codebook = unit(z), unit(codebook)
    return search(z, codebook, precision)


def search(z: Tensor, codebook: Tensor, precision: str, mask: Tensor | None = None) -> Tensor:
    """Index (N,) int64 of the codeword nearest to each row of ``z`` (N, D), 0 where ``mask`` is False.

    Neighbours in eights (D up to 4: fours; above 16, and "tf32" and "bf16": 64 or 128) that are all masked are not
    searched.
    """
    z = as_rows(z)
    rows, dim = z.shape
    index = torch.empty(rows, dtype=torch.int64, device=z.device)
    if rows == 0:
        return index
    mask = None if mask is None else mask.contiguous()
    if precision != "ieee":
        if precision == "bf16" and z.dtype == torch.float32:
            z, codebook = z.bfloat16(), codebook.bfloat16()
        by_products(z, codebook, mask, index, None)
    elif dim <= UNROLLED:
        _by_differences(z, codebook, mask, index, keep=False)
    else:
        doubt = torch.empty(rows, dtype=torch.bool, device=z.device)
        by_products(z, codebook, mask, index, doubt)
        _by_differences(z, codebook, doubt, index, keep=True)
    return index


def _by_differences(
    z: Tensor, codebook: Tensor, mask: Tensor | None, index: Tensor, *, keep: bool
) -> None:
    (rows, dim), (bm, bj, unrolled) = z.shape, tile(z.shape[1])
    codes = _transposed(codebook, bj * LANES)
    launch(
        kernels.search_kernel,
        (cdiv(rows, bm),),
        p_z=z,
        p_codes=codes,
        p_mask=mask,
        p_index=index,
        rows=rows,
        z_pitch=z.stride(0),
        code_pitch=codes.shape[1],
        step=1,
        D=dim,
        UNROLLED=unrolled,
        MASKED=mask is not None,
        KEEP=keep,
        BM=bm,
        BJ=bj,
        BK=LANES,
        num_stages=1,
    )


def by_products(
    z: Tensor, codebook: Tensor, mask: Tensor | None, index: Tensor, doubt: Tensor | None
) -> None:
    """Into ``index`` (N,) the codes of the best scores, and into ``doubt`` (N,) bool where they may not be the nearest;
    without ``doubt`` in one TF32 product instead of three.
    """
    (rows, dim), certified = z.shape, doubt is not None
    if z.dtype == torch.bfloat16 and z.is_cpu:  # Triton's interpreter has no bfloat16 product
        z, codebook = z.float(), codebook.float()
    codebook = codebook.contiguous()
    codes = len(codebook)
    half_norm = torch.empty(codes, dtype=torch.float32, device=z.device)
    largest = torch.zeros((), dtype=torch.int32, device=z.device)
    launch(
        kernels.half_norms_kernel,
        (cdiv(codes, NORMS),),
        p_codes=codebook,
        p_half_norm=half_norm,
        p_largest=largest,
        codes=codes,
        dim=dim,
        BK=NORMS,
        BD=64,
    )
    chosen = products_tile(dim, z.dtype, certified)
    launch(
        kernels.products_kernel,
        (cdiv(rows, chosen.rows),),
        p_z=z,
        p_codes=codebook,
        p_half_norm=half_norm,
        p_largest=largest,
        p_mask=mask,
        p_index=index,
        p_doubt=doubt,
        rows=rows,
        codes=codes,
        dim=dim,
        z_pitch=z.stride(0),
        error=products_error(dim),
        PRECISION="tf32x3" if certified else "tf32",
        MASKED=mask is not None,
        CERTIFIED=certified,
        BM=chosen.rows,
        BK=chosen.codes,
        BD=chosen.channels,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def products_error(dim: int) -> float:
    """Bound of the error of |c|^2 / 2 - z c by tensor cores, over |z| |c| + |c|^2 / 2.

    float32 factors are split in two parts of 11 bits, of which the lower is cut off after 11 more, and the product of
    the lower parts is left out: 3 2^-20. Each instruction adds at least 8 products to a float32 sum and cuts off below
    the last bit of the largest, at most three times for each product: less than D 2^-22. The norms' sum: D 2^-24.
    """
    return 2.0**-18 + (dim + 16) * 2.0**-22 + dim * 2.0**-24


class ProductsTile(NamedTuple):
    """Rows and codes of a step, channels of a product, warps, pipeline stages."""

    rows: int
    codes: int
    channels: int
    warps: int
    stages: int


def products_tile(dim: int, dtype: torch.dtype, certified: bool) -> ProductsTile:
    """Launch table of the search by products."""
    channels = max(16, min(32, next_power_of_2(dim)))  # 64 spill
    if certified and dtype == torch.float32:
        return ProductsTile(64, 64, channels, 4, 2)
    return ProductsTile(128, 64, channels, 8, 3)


def _transposed(codebook: Tensor, multiple: int) -> Tensor:
    """(D, K) float32, K padded with NaN to a multiple: NaN never wins, so the kernel needs no bounds check."""
    codes, dim = codebook.shape
    size = cdiv(codes, multiple) * multiple
    result = codebook.new_full((dim, size), torch.nan, dtype=torch.float32)
    result[:, :codes] = codebook.t()
    return result
