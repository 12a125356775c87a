"""soft_codebook on the CPU by torch's own kernels, a block of rows and codes at a time.

The exponentials of a block stay in cache between subtraction, sum and product, and nothing of size (N, V) is made
beside the gradient of the logits. A block has many rows, and no more codes than fit: few rows of all codes would make
flat products, each of which reads the whole codebook and adds to its whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Exponentials in a block, 4 MiB in float32, and its rows where there are many codes.
BLOCK, ROWS = 2**20, 1024
LOG2_E = 1 / math.log(2)


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, codes = logits.shape
    code = torch.empty(rows, codebook.shape[1], dtype=codebook.dtype)
    normalizer = torch.zeros(2, rows, dtype=torch.float32)
    largest, total = normalizer
    weights = codebook.float()
    for block in _row_blocks(rows, codes):
        largest[block] = logits[block].amax(-1)
        out = code[block]
        sums = out.float()  # itself if float32
        for part in _code_blocks(len(out), codes):
            exponentials = _exponentials(logits[block, part], largest[block, None])
            total[block] += exponentials.sum(-1)
            sums.addmm_(exponentials, weights[part], beta=int(part.start > 0))
        out.copy_(sums.div_(total[block, None]))
    nll = torch.empty(0, dtype=torch.float32)
    if target is not None:
        nll = total.log().sub_(logits.gather(1, target[:, None])[:, 0].float().sub_(largest))
    return code, nll, nll.neg().exp_(), normalizer


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
    """Gradients by the reference's formulas, p = exponentials / total; dcode and shifts are divided, not these."""
    rows, codes = logits.shape
    grad_logits = torch.empty(logits.shape if logits_wanted else 0, dtype=logits.dtype)
    grad_codebook = torch.empty(codebook.shape if codebook_wanted else 0, dtype=torch.float32)
    if grad_code is None or not rows:  # else the first block of rows fills it
        grad_codebook.zero_()
    weights = codebook.float()
    for block in _row_blocks(rows, codes):
        largest, total = normalizer[:, block, None]
        grad, shift = None, torch.zeros_like(total)
        if grad_code is not None:
            grad = grad_code[block].float() / total
            shift = torch.linalg.vecdot(grad, code[block].float())[:, None]
        if target is not None:
            place = target[block, None]
            weight = torch.zeros_like(total) if grad_nll is None else grad_nll[block, None]
            if grad_p_target is not None:
                p_target = _exponentials(logits[block].gather(1, place), largest) / total
                weight = weight - p_target * grad_p_target[block, None]
            shift -= weight / total
        for part in _code_blocks(len(total), codes):
            exponentials = _exponentials(logits[block, part], largest)
            if codebook_wanted and grad is not None:
                beta = int(block.start > 0)
                grad_codebook[part].addmm_(exponentials.t(), grad, beta=beta)
            if logits_wanted:
                out = grad_logits[block, part]
                grad_p = out.float()  # itself if float32: products and sums go where they stay
                if grad is None:
                    torch.mul(exponentials, -shift, out=grad_p)
                else:
                    torch.mm(grad, weights[part].t(), out=grad_p).sub_(shift).mul_(exponentials)
                if target is not None:  # one more term of true codes, rounded with the others
                    here = (place >= part.start) & (place < part.stop)
                    term = weight.neg().where(here, 0.0)
                    grad_p.scatter_add_(1, (place - part.start).where(here, 0), term)
                out.copy_(grad_p)
    return grad_logits, grad_codebook.to(codebook.dtype)


def _exponentials(logits: Tensor, largest: Tensor) -> Tensor:
    """exp(logits - largest) in float32: powers of 2 take torch half the time of powers of e."""
    return (logits - largest).mul_(LOG2_E).exp2_()


def _row_blocks(rows: int, codes: int) -> Iterator[slice]:
    return _slices(rows, max(ROWS, BLOCK // codes))


def _code_blocks(rows: int, codes: int) -> Iterator[slice]:
    return _slices(codes, BLOCK // rows)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
