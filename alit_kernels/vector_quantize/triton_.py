"""The op's implementation ``triton``: search, one pass for gather and losses; one for dz, sorted runs for the codebook.

Under "cosine" vectors and codes are normalised by torch before the search, bit for bit as in the reference, since the
exactness bound speaks of the normalised vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch
from .._vectors import unit
from ..codebook_statistics.triton_ import CHUNK, chunk_sums, runs, tile
from ..nearest_codeword.triton_ import search
from . import kernels


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`alit_kernels.vector_quantize`."""
    cosine = metric == "cosine"
    u, codes = (unit(z), unit(codebook)) if cosine else (z, codebook.contiguous())
    u, flat_mask = as_rows(u), None if mask is None else mask.reshape(-1).contiguous()
    rows, dim = u.shape
    index = search(u, codes, precision, flat_mask)
    quantized = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    height, width = tile(dim)
    blocks = cdiv(rows, height)
    partial = torch.empty(blocks, dtype=torch.float32, device=z.device)
    count = torch.empty(blocks, dtype=torch.int32, device=z.device)
    loss, commitment_loss, codebook_loss = (
        torch.empty((), dtype=torch.float32, device=z.device) for _ in range(3)
    )
    launch(
        kernels.gather_kernel,
        (blocks,),
        p_z=u,
        p_codes=codes,
        p_index=index,
        p_mask=flat_mask,
        p_quantized=quantized,
        p_partial=partial,
        p_count=count,
        rows=rows,
        z_pitch=u.stride(0),
        D=dim,
        MASKED=mask is not None,
        BM=height,
        BD=width,
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
        BLOCK=1024,
    )
    return quantized, index.view(z.shape[:-1]), loss, commitment_loss, codebook_loss


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    grad_commitment: Tensor,
    grad_codebook: Tensor,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """See the reference for the formulas."""
    cosine, masked = metric == "cosine", mask is not None
    codes = unit(codebook) if cosine else codebook.float()
    codes, codebook = codes.contiguous(), as_rows(codebook)
    flat, grad = as_rows(z), as_rows(grad_quantized)
    flat_index = index.reshape(-1).contiguous()
    flat_mask = mask.reshape(-1).contiguous() if mask is not None else None
    (rows, dim), num_codes = flat.shape, codebook.shape[0]
    elements = float(max(1, z.numel()))
    height, width = tile(dim)
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    norm = torch.empty(rows, dtype=torch.float32, device=z.device) if cosine else None
    count = None if flat_mask is None else flat_mask.sum()
    launch(
        kernels.grad_z_kernel,
        (cdiv(rows, height),),
        p_grad=grad,
        p_grad_loss=grad_loss,
        p_grad_commitment=grad_commitment,
        p_z=flat,
        p_codes=codes,
        p_index=flat_index,
        p_mask=flat_mask,
        p_count=count,
        p_norm=norm,
        p_result=grad_z,
        rows=rows,
        grad_pitch=grad.stride(0),
        z_pitch=flat.stride(0),
        elements=elements,
        commitment=commitment,
        D=dim,
        COSINE=cosine,
        MASKED=masked,
        BM=height,
        BD=width,
    )
    if not codebook_wanted:
        return grad_z, codebook.new_empty(0)
    grad_codes = torch.empty(codebook.shape, dtype=codebook.dtype, device=z.device)
    run = runs(flat_index, num_codes, flat_mask)
    launch(
        kernels.grad_codes_kernel,
        (num_codes,),
        p_partial=chunk_sums(flat, run, norm=norm, codes=codes),
        p_bounds=run.bounds,
        p_grad_loss=grad_loss,
        p_grad_codebook=grad_codebook,
        p_codebook=codebook,
        p_count=count,
        p_result=grad_codes,
        elements=elements,
        codebook_pitch=codebook.stride(0),
        D=dim,
        COSINE=cosine,
        MASKED=masked,
        CHUNK=CHUNK,
        BR=height,
        BD=width,
    )
    return grad_z, grad_codes
