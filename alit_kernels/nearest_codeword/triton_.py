"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from .._vectors import unit
from . import kernels

#: The largest D whose rows stay in registers, and that is searched by differences alone.
UNROLLED = 16
NORMS = 64  # codes of a program of norms
LANES = 128  # codes side by side: one for each thread, so that no code passes through shared memory


def tile(dim: int) -> dict[str, Any]:
    """Launch table of the direct search: rows of a program, codes of a thread, and whether D is unrolled.

    Up to D = 16 all of z stays in registers; beyond, it streams through L1.
    """
    rows = 4 if dim <= 4 else 8  # eight rows spill on sm_80
    return {"BM": rows, "BJ": 1 if dim <= UNROLLED else 2, "UNROLLED": dim <= UNROLLED}


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
    rows, dim = z.shape
    chosen = tile(dim)
    codes = _transposed(codebook, chosen["BJ"] * LANES)
    launch(
        kernels.search_kernel,
        (cdiv(rows, chosen["BM"]),),
        p_z=z,
        p_codes=codes,
        p_mask=mask,
        p_index=index,
        rows=rows,
        z_pitch=z.stride(0),
        code_pitch=codes.shape[1],
        step=1,
        D=dim,
        MASKED=mask is not None,
        KEEP=keep,
        BK=LANES,
        **chosen,
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
        BD=32,  # 64 spill where D is not a multiple of 16
    )
    chosen = products_tile(dim, z.dtype, certified, mask is not None)
    launch(
        kernels.products_kernel,
        (cdiv(rows, chosen["BM"]),),
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
        **chosen,
    )


def products_error(dim: int) -> float:
    """Bound of the error of |c|^2 / 2 - z c by tensor cores, over |z| |c| + |c|^2 / 2.

    float32 factors are split in two parts of 11 bits, of which the lower is cut off after 11 more, and the product of
    the lower parts is left out: 3 2^-20. Each instruction adds at least 8 products to a float32 sum and cuts off below
    the last bit of the largest, at most three times for each product: less than D 2^-22. The norms' sum: D 2^-24.
    """
    return 2.0**-18 + (dim + 16) * 2.0**-22 + dim * 2.0**-24


def products_tile(dim: int, dtype: torch.dtype, certified: bool, masked: bool) -> dict[str, Any]:
    """Launch table of the search by products: rows and codes of a step, channels of a product, launch options."""
    sizes = {"BK": 64, "BD": max(16, min(32, next_power_of_2(dim)))}  # 64 channels spill
    if certified and dtype == torch.float32:
        # With a mask two stages spill on sm_80.
        return {"BM": 64, **sizes, "num_warps": 4, "num_stages": 1 if masked else 2}
    return {"BM": 128, **sizes, "num_warps": 8, "num_stages": 3}


def _transposed(codebook: Tensor, multiple: int) -> Tensor:
    """(D, K) float32, K padded with NaN to a multiple: NaN never wins, so the kernel needs no bounds check."""
    codes, dim = codebook.shape
    size = cdiv(codes, multiple) * multiple
    result = codebook.new_full((dim, size), torch.nan, dtype=torch.float32)
    result[:, :codes] = codebook.t()
    return result
