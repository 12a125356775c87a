"""soft_codebook on the CPU by torch's own kernels, a block of rows at a time.

A block of probabilities stays in cache between softmax, read-out and product: the logits are read once each way, and
nothing of size (N, V) is made beside the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Probabilities in a block: 1 MiB in float32.
BLOCK = 2**18


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, codes = logits.shape
    code = torch.empty(rows, codebook.shape[1], dtype=codebook.dtype)
    nll = torch.empty(0 if target is None else rows, dtype=torch.float32)
    normaliser = torch.empty(2, rows, dtype=torch.float32)
    largest, total = normaliser
    weights = codebook.float()
    for block in _blocks(rows, codes):
        values = logits[block].float()
        torch.amax(values, -1, out=largest[block])
        shifted = values - largest[block, None]
        if target is not None:
            nll[block] = shifted.gather(1, target[block, None])[:, 0]
        exponentials = shifted.exp_()
        torch.sum(exponentials, -1, out=total[block])
        code[block] = (exponentials @ weights).div_(total[block, None])
    if target is not None:
        nll = total.log().sub_(nll)
    return code, nll, nll.neg().exp_(), normaliser


def soft_codebook_backward(
    grad_code: Tensor | None,
    grad_nll: Tensor | None,
    grad_p_target: Tensor | None,
    logits: Tensor,
    codebook: Tensor,
    target: Tensor | None,
    code: Tensor,
    normaliser: Tensor,
    logits_wanted: bool,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The reference's formulas, block by block."""
    rows, codes = logits.shape
    grad_logits = torch.empty(logits.shape if logits_wanted else 0, dtype=logits.dtype)
    grad_codebook = torch.zeros(codebook.shape if codebook_wanted else 0, dtype=torch.float32)
    transposed = codebook.float().t()
    for block in _blocks(rows, codes):
        p = logits[block].softmax(-1, dtype=torch.float32)
        if grad_code is None:
            grad_p, shift = torch.zeros_like(p), p.new_zeros(())
        else:
            grad = grad_code[block].float()
            if codebook_wanted:
                grad_codebook.addmm_(p.t(), grad)
            if not logits_wanted:
                continue
            grad_p = grad @ transposed
            shift = torch.linalg.vecdot(p, grad_p)[:, None]
        # Both terms are p times something less its mean under p, but for the target's own entry.
        if target is not None:
            place = target[block, None]
            weight = 0.0 if grad_nll is None else grad_nll[block, None]
            if grad_p_target is not None:
                weight = weight - p.gather(1, place) * grad_p_target[block, None]
            shift = shift - weight
        grad_p.sub_(shift).mul_(p)
        if target is not None and isinstance(weight, Tensor):
            grad_p.scatter_add_(1, place, -weight)
        grad_logits[block] = grad_p
    return grad_logits, grad_codebook.to(codebook.dtype)


def _blocks(rows: int, codes: int) -> Iterator[slice]:
    size = max(1, BLOCK // codes)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
