"""Plain PyTorch definition of soft_codebook and of its gradient.

With p = softmax(logits): code = p @ codebook, nll = -log p[target], p_target = p[target]; empty nll and p_target where
there is no target. Accumulation in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    log_p = logits.to(dtype).log_softmax(-1)
    largest = logits.to(dtype).amax(-1)
    normaliser = torch.stack([largest, (logits.to(dtype) - largest[:, None]).exp().sum(-1)])
    code = (log_p.exp() @ codebook.to(dtype)).to(codebook.dtype)
    if target is None:
        return code, log_p.new_empty(0), log_p.new_empty(0), normaliser
    log_p_target = log_p.gather(1, target[:, None])[:, 0]
    return code, -log_p_target, log_p_target.exp(), normaliser


def soft_codebook_backward(
    grad_code: Tensor,
    grad_nll: Tensor,
    grad_p_target: Tensor,
    logits: Tensor,
    codebook: Tensor,
    target: Tensor | None,
    code: Tensor,
    normaliser: Tensor,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """With g = dcode @ codebook^T: dcodebook = p^T dcode and
    dlogits = p (g - p . g) + (dnll - p_target dp_target)(p - onehot).

    Other implementations take p from the normaliser, and p . g = dcode . code.
    """
    dtype = accumulation_dtype(logits)
    p = logits.to(dtype).softmax(-1)
    grad_code = grad_code.to(dtype)
    grad_p = grad_code @ codebook.to(dtype).t()
    grad_logits = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    if target is not None:
        p_target = p.gather(1, target[:, None])
        weight = grad_nll[:, None] - p_target * grad_p_target[:, None]
        grad_logits = (grad_logits + weight * p).scatter_add(1, target[:, None], -weight)
    if not codebook_wanted:
        return grad_logits.to(logits.dtype), codebook.new_empty(0)
    return grad_logits.to(logits.dtype), (p.t() @ grad_code).to(codebook.dtype)
