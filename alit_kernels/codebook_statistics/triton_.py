"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import architecture, as_rows, cdiv, launch, next_power_of_2
from . import kernels

BLOCK = 256  # rows that are put in order at once
LONG = 16  # rows of a group in a block from which on they are summed with their block
COMPARED = 64  # rows with which those of a block are compared at once
SUMS = 512  # sums of a step, for each warp
BLOCKS = 128  # blocks of a step


def tile(dim: int) -> dict[str, int]:
    """Codes of a group, and rows and channels of a step, with 16 sums in float64 for each thread."""
    width = next_power_of_2(max(1, dim))
    group = max(1, min(8, 128 // width))
    rows = SUMS * warps(dim) // (group * width)
    return {"KB": group, "BR": max(1, min(BLOCK, rows)), "BD": width}


def warps(dim: int) -> int:
    """Number of warps of a program that sums: narrow vectors come in longer steps."""
    return 8 if dim <= 16 else 4


def ordered(
    index: Tensor,
    mask: Tensor | None,
    z: Tensor,
    num_codes: int,
    *,
    codebook: Tensor | None = None,
    normalized: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """Put the rows of z (N, D) in the order of their codes.

    Args:
        codebook: (K, D): differences code - z are to be summed.
        normalized: z and codes are divided by max(norm, 1e-12) first.

    Returns:
        Arguments of a kernel with ``sum_of_group``, and the number of rows of each block that take part, (blocks,).
    """
    (rows, dim), sizes = z.shape, tile(z.shape[1])
    eight = dim > 128 and z.element_size() == 2  # channels a thread: longer steps spill
    blocks, groups = cdiv(rows, BLOCK), cdiv(num_codes, sizes["KB"])
    slots = blocks * (BLOCK // LONG) * sizes["KB"]
    keys = torch.int32 if groups < 2**31 // BLOCK - 1 else torch.int64
    order = torch.empty(blocks * BLOCK, dtype=keys, device=z.device)
    table = torch.empty(blocks, groups, 2, dtype=torch.int16, device=z.device)
    partial = torch.empty(slots, dim + 1, dtype=torch.float64, device=z.device)
    taking = torch.empty(blocks, dtype=torch.int32, device=z.device)
    shared: dict[str, Any] = {
        "p_index": index,
        "p_z": z,
        "p_order": order,
        "p_table": table,
        "p_partial": partial,
        "codes": num_codes,
        "groups": groups,
        "z_pitch": z.stride(0),
        "D": dim,
        "LONG": LONG,
        "BN": BLOCK,
        **sizes,
    }
    launch(
        kernels.order_kernel,
        (blocks,),
        **shared,
        p_mask=mask,
        p_codes=codebook,
        p_taking=taking,
        rows=rows,
        codes_pitch=0 if codebook is None else codebook.stride(0),
        DIFFERENCE=codebook is not None,
        NORMALIZED=normalized,
        MASKED=mask is not None,
        BC=COMPARED // (2 if eight and normalized else 1),
        num_warps=8,
    )
    shared |= {"blocks": blocks, "BT": BLOCKS, "num_warps": warps(dim)}
    if normalized:  # float64 vectors take more registers
        shared |= {"BT": BLOCKS // 8, "BR": sizes["BR"] // (2 if eight else 1)}
    elif eight and architecture(z.device) in (86, 89):
        shared |= {"BT": BLOCKS // 4, "BR": sizes["BR"] // 2}
    return shared, taking


def not_ordered(index: Tensor, z: Tensor) -> dict[str, Any]:
    """Arguments of a kernel with ``sum_of_group`` that sums nothing."""
    tensors = {"p_index": index, "p_z": z, "p_order": None, "p_table": None, "p_partial": None}
    sizes = dict.fromkeys(("codes", "groups", "blocks", "LONG", "BN"), 0) | tile(z.shape[1])
    return tensors | sizes | {"z_pitch": z.stride(0), "D": z.shape[1], "BT": BLOCKS}


def codebook_statistics(
    index: Tensor, z: Tensor, num_codes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Count (K,) and total (K, D) float32 of each code's vectors; see :func:`alit_kernels.codebook_statistics`."""
    z, index = as_rows(z), index.contiguous()
    mask = None if mask is None else mask.contiguous()
    count = torch.empty(num_codes, dtype=torch.float32, device=z.device)
    total = torch.empty(num_codes, z.shape[1], dtype=torch.float32, device=z.device)
    sums, _ = ordered(index, mask, z, num_codes)
    launch(kernels.sums_kernel, (sums["groups"],), **sums, p_count=count, p_total=total)
    return count, total
