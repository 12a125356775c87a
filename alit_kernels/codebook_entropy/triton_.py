"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from ..nearest_codeword.triton_ import prepare
from . import kernels

#: Programs wanted of kernels that go over codes, about four per multiprocessor: rows are split to have as many.
PROGRAMS = 512
#: Channels up to which products of float32 are plain ones.
PLAIN = 16


def tile(dim: int, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    """Launch table: rows, codes and channels of a step, and launch options.

    Args:
        dim, dtype: of the vectors as they are searched; float32 under "cosine".
        kernel: "rows", "means", "z" or "codes".
    """
    width, single = max(16, next_power_of_2(dim)), dtype == torch.float32
    precision = "tf32" if not single else "ieee" if dim <= PLAIN else "tf32x3"
    # On sm_100 and smaller chips more channels, or more stages, spill.
    step = 16 if single and (kernel == "means" or (kernel == "z" and width in (32, 256))) else 32
    sizes: dict[str, Any] = {"BM": 32, "BK": 32, "BD": min(width, step), "PRECISION": precision}
    if kernel in ("z", "codes"):
        sizes["BC"] = min(width, 128)
    wide = sizes.get("BC", 0) >= 128
    stages = 1 if kernel == "codes" and not single else 2
    return {**sizes, "num_warps": 8 if wide else 4, "num_stages": stages}


def codebook_entropy(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample and batch entropy, and what the backward takes, as the reference returns them."""
    mask = None if mask is None else mask.reshape(-1).contiguous()
    common = _common(z, codebook, mask, metric, temperature)
    u, rows, codes = common["p_z"], common["rows"], common["codes"]
    sample, batch, mean, entropy, normalizer, count = (
        torch.empty(shape, dtype=torch.float32, device=z.device)
        for shape in ((), (), (codes,), (rows,), (2, rows), ())
    )
    chosen = tile(u.shape[1], u.dtype, "rows")
    launch(
        kernels.rows_kernel,
        (cdiv(rows, chosen["BM"]),),
        **common,
        p_normalizer=normalizer,
        p_entropy=entropy,
        **chosen,
    )
    chosen = tile(u.shape[1], u.dtype, "means")
    split, parts = _split(rows, cdiv(codes, chosen["BK"]), chosen["BM"])
    partial = torch.empty(parts, codes, dtype=torch.float32, device=z.device)
    launch(
        kernels.means_kernel,
        (cdiv(codes, chosen["BK"]), parts),
        **common,
        p_normalizer=normalizer,
        p_partial=partial,
        split=split,
        **chosen,
    )
    launch(
        kernels.entropies_kernel,
        (1,),
        p_entropy=entropy,
        p_mask=mask,
        p_partial=partial,
        p_sample=sample,
        p_batch=batch,
        p_mean=mean,
        p_count=count,
        rows=rows,
        codes=codes,
        parts=parts,
        epsilon=epsilon,
        MASKED=mask is not None,
        BLOCK=1024,
        num_warps=8,
    )
    return sample, batch, mean, entropy, normalizer, count


def codebook_entropy_backward(
    grad_sample: Tensor | None,
    grad_batch: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    entropy: Tensor,
    normalizer: Tensor,
    count: Tensor,
    metric: str,
    temperature: float,
    epsilon: float,
    z_wanted: bool,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and codebook, as the reference returns them; see there for the formulas."""
    mask = None if mask is None else mask.reshape(-1).contiguous()
    common = _common(z, codebook, mask, metric, temperature)
    u, rows, codes = common["p_z"], common["rows"], common["codes"]
    dim, cosine = u.shape[1], metric == "cosine"
    common |= {
        "p_mean": mean.contiguous(),
        "p_normalizer": normalizer.contiguous(),
        "p_count": count,
        "p_grad_sample": grad_sample,
        "p_grad_batch": grad_batch,
        "epsilon": epsilon,
    }
    grad_z = z.new_empty(z.shape if z_wanted else 0)
    grad_codebook = codebook.new_empty(codebook.shape if codebook_wanted else 0)
    grad_u = None
    if cosine and z_wanted:
        grad_u = torch.empty(rows, dim, dtype=torch.float32, device=z.device)
    constant = torch.empty(rows, dtype=torch.float32, device=z.device)
    chosen = tile(dim, u.dtype, "z")
    launch(
        kernels.grad_z_kernel,
        (cdiv(rows, chosen["BM"]), max(1, cdiv(dim, chosen["BC"])) if z_wanted else 1),
        **common,
        p_entropy=entropy.contiguous(),
        p_constant=constant,
        p_result=grad_z if grad_u is None else grad_u,
        WANTED=z_wanted,
        **chosen,
    )
    partial = partial_sum = None
    parts = 0
    if codebook_wanted:
        chosen = tile(dim, u.dtype, "codes")
        tiles = cdiv(codes, chosen["BK"]), max(1, cdiv(dim, chosen["BC"]))
        split, parts = _split(rows, tiles[0] * tiles[1], chosen["BM"])
        partial, partial_sum = (
            torch.empty(shape, dtype=torch.float32, device=z.device)
            for shape in ((parts, codes, dim), (parts, codes))
        )
        launch(
            kernels.grad_codes_kernel,
            (*tiles, parts),
            **common,
            p_constant=constant,
            p_partial=partial,
            p_partial_sum=partial_sum,
            split=split,
            **chosen,
        )
    flat, codebook = as_rows(z), as_rows(codebook)
    width = next_power_of_2(max(1, dim))
    height = max(1, min(128, 1024 // width))
    code_blocks = cdiv(codes, height) if codebook_wanted else 0
    launch(
        kernels.finish_kernel,
        (code_blocks + (0 if grad_u is None else cdiv(rows, height)),),
        p_z=flat,
        p_codebook=codebook,
        p_mask=mask,
        p_grad_u=grad_u,
        p_partial=partial,
        p_partial_sum=partial_sum,
        p_grad_z=grad_z,
        p_grad_codebook=grad_codebook,
        rows=rows,
        codes=codes,
        code_blocks=code_blocks,
        parts=parts,
        z_pitch=flat.stride(0),
        codebook_pitch=codebook.stride(0),
        scale=2 / temperature,
        D=dim,
        COSINE=cosine,
        MASKED=mask is not None,
        BM=height,
        BD=width,
    )
    return grad_z, grad_codebook


def _common(
    z: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, temperature: float
) -> dict[str, Any]:
    """Arguments of all kernels that compute distances."""
    found = prepare(z, codebook, cosine=metric == "cosine")
    return {
        "p_z": found.z,
        "p_codes": found.codes,
        "p_half_norm": found.norms,
        "p_mask": mask,
        "rows": len(found.z),
        "codes": len(found.codes),
        "z_pitch": found.z.stride(0),
        "scale": 2 / temperature,
        "D": found.z.shape[1],
        "MASKED": mask is not None,
    }


def _split(rows: int, tiles: int, step: int) -> tuple[int, int]:
    """Number of rows that a program takes, a multiple of its step, and number of parts of the rows that this makes."""
    split = cdiv(cdiv(rows, max(1, PROGRAMS // tiles)), step) * step
    return split, cdiv(rows, max(1, split))
