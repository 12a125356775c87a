"""The op's implementation ``triton``: search, and one pass for gather and losses; one launch for both gradients, of
rows in the order of their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from ..codebook_statistics.triton_ import BLOCK, not_ordered, ordered
from ..nearest_codeword.triton_ import search
from . import kernels


def _rows_of_a_block(dim: int) -> int:
    return max(1, min(128, 2048 // next_power_of_2(max(1, dim))))


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_weight: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantized vectors, index and losses, as the op returns them; see :func:`alit_kernels.vector_quantize`."""
    flat_mask = None if mask is None else mask.reshape(-1).contiguous()
    flat, codebook = as_rows(z), as_rows(codebook)
    rows, dim = flat.shape
    index = search(flat, codebook, metric, precision, flat_mask)
    quantized = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    height = _rows_of_a_block(dim)
    blocks = cdiv(rows, height)
    partial = torch.empty(blocks, dtype=torch.float32, device=z.device)
    count = torch.empty(blocks, dtype=torch.int32, device=z.device)
    loss, commitment_loss, codebook_loss = (
        torch.empty((), dtype=torch.float32, device=z.device) for _ in range(3)
    )
    launch(
        kernels.gather_kernel,
        (blocks,),
        p_z=flat,
        p_codes=codebook,
        p_index=index,
        p_mask=flat_mask,
        p_quantized=quantized,
        p_partial=partial,
        p_count=count,
        rows=rows,
        z_pitch=flat.stride(0),
        codes_pitch=codebook.stride(0),
        D=dim,
        COSINE=metric == "cosine",
        MASKED=mask is not None,
        BM=height,
        BD=next_power_of_2(max(1, dim)),
    )
    launch(
        kernels.losses_kernel,
        (1,),
        p_partial=partial,
        p_count=count,
        p_loss=loss,
        p_commitment=commitment_loss,
        p_codebook=codebook_loss,
        blocks=blocks,
        dim=dim,
        commitment=commitment,
        codebook_weight=codebook_weight,
        BLOCK=1024,
    )
    return quantized, index.view(z.shape[:-1]), loss, commitment_loss, codebook_loss


def vector_quantize_backward(
    grad_quantized: Tensor | None,
    grad_loss: Tensor | None,
    grad_commitment: Tensor | None,
    grad_codebook: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_weight: float,
    z_wanted: bool,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of z and codebook, as the reference returns them; see there for the formulas."""
    flat, codebook = as_rows(z), as_rows(codebook)
    grad = None if grad_quantized is None else as_rows(grad_quantized)
    index = index.reshape(-1).contiguous()
    mask = None if mask is None else mask.reshape(-1).contiguous()
    rows, dim = flat.shape
    grad_z = z.new_empty(z.shape if z_wanted else 0)
    grad_codes = codebook.new_empty(codebook.shape if codebook_wanted else 0)
    taking: Tensor | None
    if codebook_wanted:
        sums, taking = ordered(
            *(index, mask, flat, len(codebook)), codebook=codebook, normalized=metric == "cosine"
        )
    else:
        sums = not_ordered(index, flat)
        taking = None if mask is None else _taking_part(mask)
    height = _rows_of_a_block(dim)
    launch(
        kernels.grad_kernel,
        (sums["groups"] + (cdiv(rows, height) if z_wanted else 0),),
        **sums,
        p_codes=codebook,
        p_mask=mask,
        p_grad=grad,
        p_grad_loss=grad_loss,
        p_grad_commitment=grad_commitment,
        p_grad_codebook=grad_codebook,
        p_taking=taking,
        p_grad_z=grad_z,
        p_grad_codes=grad_codes,
        rows=rows,
        taking=cdiv(rows, BLOCK),
        elements=float(max(1, z.numel())),
        commitment=commitment,
        codebook_weight=codebook_weight,
        codes_pitch=codebook.stride(0),
        grad_pitch=0 if grad is None else grad.stride(0),
        COSINE=metric == "cosine",
        MASKED=mask is not None,
        CODEBOOK=codebook_wanted,
        BM=height,
    )
    return grad_z, grad_codes


def _taking_part(mask: Tensor) -> Tensor:
    """Number of rows of each block that take part, (blocks,) int32."""
    taking = torch.empty(cdiv(len(mask), BLOCK), dtype=torch.int32, device=mask.device)
    launch(
        kernels.count_kernel,
        (len(taking),),
        p_mask=mask,
        p_taking=taking,
        rows=len(mask),
        BN=BLOCK,
    )
    return taking
