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
    normalizer = torch.stack([largest, (logits.to(dtype) - largest[:, None]).exp().sum(-1)])
    code = (log_p.exp() @ codebook.to(dtype)).to(codebook.dtype)
    if target is None:
        return code, log_p.new_empty(0), log_p.new_empty(0), normalizer
    log_p_target = log_p.gather(1, target[:, None])[:, 0]
    return code, -log_p_target, log_p_target.exp(), normalizer


def soft_codebook_backward(
    grad_code: Tensor | None,
    grad_nll: Tensor | None,
    grad_p_target: Tensor | None,
    logits: Tensor,
    codebook: Tensor,
    target: Tensor | None,
    code: Tensor,
    normalizer: Tensor,
    logits_wanted: bool,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and codebook. With g = dcode @ codebook^T: dcodebook = p^T dcode and
    dlogits = p (g - p . g) + (dnll - p_target dp_target)(p - onehot).

    A gradient that is None is zero; the codebook's is asked for only where there is dcode. Other implementations take p
    from the normalizer, and p . g = dcode . code.
    """
    dtype = accumulation_dtype(logits)
    p = logits.to(dtype).softmax(-1)
    grad_logits, grad_codebook = logits.new_empty(0), codebook.new_empty(0)
    if logits_wanted:
        grad = torch.zeros_like(p)
        if grad_code is not None:
            grad_p = grad_code.to(dtype) @ codebook.to(dtype).t()
            grad = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        if target is not None:
            p_target = p.gather(1, target[:, None])
            weight = torch.zeros_like(p_target) if grad_nll is None else grad_nll[:, None]
            if grad_p_target is not None:
                weight = weight - p_target * grad_p_target[:, None]
            grad = (grad + weight * p).scatter_add(1, target[:, None], -weight)
        grad_logits = grad.to(logits.dtype)
    if codebook_wanted and grad_code is not None:
        grad_codebook = (p.t() @ grad_code.to(dtype)).to(codebook.dtype)
    return grad_logits, grad_codebook
