"""codebook_entropy and its gradient in C++ (csrc/codebook_entropy): a few rows against the codes at a time.

The core takes plain products of rows and codes in float32. (2 u c - |c|^2) / temperature is one of rows
2 u / temperature and codes c with one more coordinate, -1 and |c|^2 / temperature. That is infinite in the rows that
fill the last panel of codes: their probability is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import core, instruction_set, pointer, threads
from .._vectors import through_unit, unit
from .reference import slopes


def codebook_entropy(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, panels = (
        _rows(z, mask, metric, temperature),
        _panels(_float(codebook, metric), temperature),
    )
    largest, total, entropy = torch.empty(3, len(rows))
    mean = torch.empty(panels.shape[0] * panels.shape[2])
    core().codebook_entropy(
        *_addresses(panels, rows),
        *map(pointer, (largest, total, entropy, mean)),
        threads(),
        instruction_set(),
    )
    count = torch.tensor(float(max(1, len(rows))))
    mean = mean[: len(codebook)] / count
    sample = entropy.sum(dtype=torch.float64).div(count).float()
    batch = -torch.xlogy(mean, mean + epsilon).sum()
    normalizer = torch.stack([largest, total])
    return sample, batch, mean, _spread(entropy, mask), _spread(normalizer, mask), count


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
    codes = _float(codebook, metric)
    rows, panels = _rows(z, mask, metric, temperature), _panels(codes, temperature)
    if mask is not None:
        entropy, normalizer = entropy[mask.flatten()], normalizer[:, mask.flatten()]
    slope = torch.zeros(panels.shape[0] * panels.shape[2])
    slope[: len(mean)] = slopes(mean, epsilon)
    largest, total = normalizer.contiguous()
    entropy = entropy.contiguous()
    grad_rows = torch.empty_like(rows) if z_wanted else None
    grad_panels = torch.empty_like(panels) if codebook_wanted else None
    core().codebook_entropy_backward(
        *_addresses(panels, rows),
        *(0.0 if grad is None else -float(grad / count) for grad in (grad_sample, grad_batch)),
        *map(pointer, (slope, largest, total, entropy, grad_rows, grad_panels)),
        threads(),
        instruction_set(),
    )
    grad_z, grad_codebook = z.new_empty(0), codebook.new_empty(0)
    if grad_rows is not None:
        grad_u = grad_rows[:, :-1] * (2 / temperature) - grad_rows[:, -1:] * rows[:, :-1]
        grad_z = _through(_spread(grad_u.t(), mask).t().view(z.shape), z, mask, metric)
    if grad_panels is not None:
        grad = grad_panels.transpose(1, 2).flatten(0, 1)[: len(codes)]
        grad_codes = grad[:, :-1] + grad[:, -1:] * codes * (2 / temperature)
        grad_codebook = _through(grad_codes, codebook, None, metric)
    return grad_z, grad_codebook


def _float(x: Tensor, metric: str) -> Tensor:
    return unit(x) if metric == "cosine" else x.float()


def _rows(z: Tensor, mask: Tensor | None, metric: str, temperature: float) -> Tensor:
    """Rows that take part, as the core multiplies them: (rows, D + 1) float32."""
    rows = z.reshape(z.shape[:-1].numel(), z.shape[-1])
    u = _float(rows if mask is None else rows[mask.flatten()], metric)
    return torch.cat([u * (2 / temperature), u.new_full((len(u), 1), -1.0)], 1)


def _panels(codes: Tensor, temperature: float) -> Tensor:
    """Codes as the core multiplies them: (panels, D + 1, codes in a panel) float32."""
    width = core().ENTROPY_PANEL
    size, dim = codes.shape
    filled = codes.new_zeros(-(-size // width) * width, dim + 1)
    filled[:size, :dim] = codes
    filled[:, dim] = torch.inf
    filled[:size, dim] = codes.square().sum(1) / temperature
    return filled.view(-1, width, dim + 1).transpose(1, 2).contiguous()


def _addresses(panels: Tensor, rows: Tensor) -> tuple[int, int, int, int, int]:
    return pointer(panels), *panels.shape[:2], pointer(rows), len(rows)


def _spread(x: Tensor, mask: Tensor | None) -> Tensor:
    """Values (..., rows that take part) spread over all rows: (..., rows), 0 where masked."""
    if mask is None:
        return x.contiguous()
    result = x.new_zeros(*x.shape[:-1], mask.numel())
    result[..., mask.flatten()] = x
    return result


def _through(grad: Tensor, x: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    if metric == "cosine":
        grad = through_unit(grad, x)
        grad = grad if mask is None else torch.where(mask[..., None], grad, 0.0)
    return grad.to(x.dtype).contiguous()
