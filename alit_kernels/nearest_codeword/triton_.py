"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: The largest D whose rows stay in registers, and that is searched by differences alone.
UNROLLED = 16
LANES = 128  # codes side by side: one for each thread, so that no code passes through shared memory


def tile(dim: int) -> dict[str, Any]:
    """Launch table of the direct search: rows of a program, codes of a thread, and whether D is unrolled.

    Up to D = 16 all of z stays in registers; beyond, it streams through L1.
    """
    rows = 4 if dim <= 4 else 8  # eight rows spill on sm_80
    return {"BM": rows, "BJ": 1 if dim <= UNROLLED else 2, "UNROLLED": dim <= UNROLLED}


class Prepared(NamedTuple):
    """What a search reads.

    Attributes:
        z: (N, D), what is searched for, normalised under "cosine", and then float32.
        codes: (K, D), contiguous, likewise.
        columns: (D, K) float32, K padded with NaN to a multiple: NaN never wins, so no kernel has to check bounds.
        half_norm: (K,) float32, |c|^2 / 2, infinite for codes that are not finite.
        largest: float32, the largest one of finite codes, of some codes each.
    """

    z: Tensor
    codes: Tensor
    columns: Tensor | None
    half_norm: Tensor | None
    largest: Tensor | None


def prepare(z: Tensor, codebook: Tensor, *, cosine: bool, columns: bool, norms: bool) -> Prepared:
    """What is asked for, of z (N, D) and codebook (K, D), by one launch."""
    z, codebook = as_rows(z), as_rows(codebook) if cosine else codebook.contiguous()
    (rows, dim), codes = z.shape, len(codebook)
    width = next_power_of_2(max(1, dim))
    height = max(1, min(128, 2048 // width))
    multiple = tile(dim)["BJ"] * LANES if columns else height
    pitch = cdiv(codes, multiple) * multiple
    blocks = cdiv(pitch, height)

    def new(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=z.device) if wanted else None

    u, units = new(cosine, rows, dim), new(cosine and norms, codes, dim)
    result = Prepared(
        z if u is None else u,
        codebook if units is None else units,
        new(columns, dim, pitch),
        new(norms, codes),
        new(norms, blocks),
    )
    launch(
        kernels.prepare_kernel,
        ((blocks if cosine or columns or norms else 0) + (cdiv(rows, height) if cosine else 0),),
        p_codebook=codebook,
        p_z=z,
        p_columns=result.columns,
        p_codes=units,
        p_u=u,
        p_half_norm=result.half_norm,
        p_largest=result.largest,
        rows=rows,
        codes=codes,
        code_blocks=blocks,
        z_pitch=z.stride(0),
        codebook_pitch=codebook.stride(0),
        columns_pitch=pitch,
        D=dim,
        NORMALISED=cosine,
        BK=height,
        BD=width,
    )
    return result


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """See :func:`alit_kernels.nearest_codeword`."""
    return search(z, codebook, metric, precision)


def search(
    z: Tensor, codebook: Tensor, metric: str, precision: str, mask: Tensor | None = None
) -> Tensor:
    """Index (N,) int64 of the codeword nearest to each row of ``z`` (N, D), 0 where ``mask`` is False.

    Neighbours in eights (D up to 4: fours; above 16, and "tf32" and "bf16": 64 or 128) that are all masked are not
    searched.
    """
    exact, (rows, dim) = precision == "ieee", z.shape
    by_both = exact and dim > UNROLLED
    found = prepare(
        z, codebook, cosine=metric == "cosine", columns=exact, norms=not exact or by_both
    )
    index = torch.empty(rows, dtype=torch.int64, device=z.device)
    mask = None if mask is None else mask.contiguous()
    if by_both:
        doubt = torch.empty(rows, dtype=torch.bool, device=z.device)
        by_products(found, mask, index, doubt)
        _by_differences(found, doubt, index, keep=True)
    elif exact:
        _by_differences(found, mask, index, keep=False)
    else:
        if precision == "bf16" and found.z.dtype == torch.float32:
            z, codebook = found.z.bfloat16(), found.codes.bfloat16()
            found = prepare(z, codebook, cosine=False, columns=False, norms=True)
        by_products(found, mask, index, None)
    return index


def _by_differences(searched: Prepared, mask: Tensor | None, index: Tensor, *, keep: bool) -> None:
    z, columns = searched.z, searched.columns
    assert columns is not None
    rows, dim = z.shape
    chosen = tile(dim)
    launch(
        kernels.search_kernel,
        (cdiv(rows, chosen["BM"]),),
        p_z=z,
        p_codes=columns,
        p_mask=mask,
        p_index=index,
        rows=rows,
        z_pitch=z.stride(0),
        code_pitch=columns.shape[1],
        step=1,
        D=dim,
        MASKED=mask is not None,
        KEEP=keep,
        BK=LANES,
        **chosen,
        num_stages=1,
    )


def by_products(
    searched: Prepared, mask: Tensor | None, index: Tensor, doubt: Tensor | None
) -> None:
    """Into ``index`` (N,) the codes of the best scores, and into ``doubt`` (N,) bool where they may not be the nearest;
    without ``doubt`` in one TF32 product instead of three.
    """
    z, codes, certified = searched.z, searched.codes, doubt is not None
    if z.dtype == torch.bfloat16 and z.is_cpu:  # Triton's interpreter has no bfloat16 product
        z, codes = z.float(), codes.float()
    rows, dim = z.shape
    assert searched.largest is not None
    chosen = products_tile(dim, z.dtype, certified, mask is not None)
    launch(
        kernels.products_kernel,
        (cdiv(rows, chosen["BM"]),),
        p_z=z,
        p_codes=codes,
        p_half_norm=searched.half_norm,
        p_largest=searched.largest,
        p_mask=mask,
        p_index=index,
        p_doubt=doubt,
        rows=rows,
        codes=len(codes),
        code_blocks=len(searched.largest),
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
