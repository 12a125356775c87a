"""vector_quantize and its gradient in C++ (csrc/vector_quantize)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import core, matrix, pointer, threads, type_code
from .._vectors import unit
from ..nearest_codeword.cpp import search


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_weight: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, codes = (unit(z), unit(codebook)) if metric == "cosine" else (z, codebook)
    mask = None if mask is None else mask.contiguous()
    index = search(u, codes, mask)
    quantized = torch.empty(z.shape, dtype=z.dtype)
    losses = torch.empty(3, dtype=torch.float32)
    core().gather_and_losses(
        matrix(u),
        matrix(codes),
        pointer(index),
        pointer(mask),
        commitment,
        codebook_weight,
        type_code(z),
        pointer(quantized),
        pointer(losses),
        threads(),
    )
    loss, commitment_loss, codebook_loss = (value.clone() for value in losses)
    return quantized, index, loss, commitment_loss, codebook_loss


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
    """Gradients of z and codebook, deterministic whatever is asked for: atomics would not be faster here."""
    losses = grad_loss, grad_commitment, grad_codebook
    grad_z = torch.empty(z.shape, dtype=z.dtype)
    grad_codes = codebook.new_empty(codebook.shape if codebook_wanted else 0)
    index, mask = index.contiguous(), None if mask is None else mask.contiguous()
    core().quantize_backward(
        matrix(torch.zeros_like(z) if grad_quantized is None else grad_quantized),
        *(0.0 if grad is None else float(grad) for grad in losses),
        matrix(z),
        matrix(codebook),
        pointer(index),
        pointer(mask),
        metric == "cosine",
        commitment,
        codebook_weight,
        pointer(grad_z),
        pointer(grad_codes if codebook_wanted else None),
        threads(),
    )
    return grad_z if z_wanted else z.new_empty(0), grad_codes
