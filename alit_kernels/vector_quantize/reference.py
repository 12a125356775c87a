"""Plain PyTorch definition of vector_quantize and of its gradient.

With u = z and e = codebook, both divided by max(norm, 1e-12) under "cosine", q = e[index] and M the number of elements
that are not masked: commitment loss = c sum((u - q)^2) / M, codebook loss = w sum((q - u)^2) / M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._vectors import through_unit, unit
from ..nearest_codeword.reference import nearest_codeword


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_weight: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = nearest_codeword(z.flatten(0, -2), codebook, metric, precision).view(z.shape[:-1])
    if mask is not None:
        index = torch.where(mask, index, 0)
    u, codes = _prepared(z, metric), _prepared(codebook, metric)
    q = codes[index]
    difference = _masked(q - u, mask)
    mean = difference.square().sum() / _elements(z, mask)
    commitment_loss, codebook_loss = commitment * mean, codebook_weight * mean
    quantized = _masked(q, mask).to(z.dtype)
    return quantized, index, commitment_loss + codebook_loss, commitment_loss, codebook_loss


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
    """Gradients of z and codebook: du = dquantized + 2 c (u - q) dcommitment / M, dq = 2 w (q - u) dcodebook / M.

    ``quantized`` passes no gradient to the codes. A gradient that is None is zero.
    """
    grad_z, grad_codes = z.new_empty(0), codebook.new_empty(0)
    u, codes = _prepared(z, metric), _prepared(codebook, metric)
    slope = _masked(codes[index] - u, mask) * (2 / _elements(z, mask))
    if z_wanted:
        grad_u = -slope * (commitment * _sum(grad_loss, grad_commitment))
        if grad_quantized is not None:
            grad_u = grad_u + _masked(grad_quantized.to(u.dtype), mask)
        if metric == "cosine":
            grad_u = _masked(through_unit(grad_u, z), mask)
        grad_z = grad_u.to(z.dtype).contiguous()
    if codebook_wanted:
        grad_q = slope * (codebook_weight * _sum(grad_loss, grad_codebook))
        # At float64 the CPU adds in order, at float32 with atomics: only the former is deterministic.
        wide = torch.float32 if z.device.type == "mps" else torch.float64
        grad_codes = torch.zeros_like(codes, dtype=wide).index_put(
            (index.flatten(),), grad_q.flatten(0, -2).to(wide), accumulate=True
        )
        grad_codes = grad_codes.to(codes.dtype)
        if metric == "cosine":
            grad_codes = through_unit(grad_codes, codebook)
        grad_codes = grad_codes.to(codebook.dtype).contiguous()
    return grad_z, grad_codes


def _sum(*grads: Tensor | None) -> Tensor | float:
    return sum(grad for grad in grads if grad is not None)


def _prepared(x: Tensor, metric: str) -> Tensor:
    return unit(x) if metric == "cosine" else x.to(accumulation_dtype(x))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def _elements(z: Tensor, mask: Tensor | None) -> Tensor | int:
    if mask is None:
        return max(1, z.numel())
    return (mask.sum() * z.shape[-1]).clamp(min=1)
