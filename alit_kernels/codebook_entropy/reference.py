"""Plain PyTorch definition of codebook_entropy and of its gradient, with the (N, K) matrix.

With u = z and c = codebook, both divided by max(norm, 1e-12) under "cosine", p = softmax of -|u - c|^2 / temperature
over the codes, and a the mean of p over the M rows that take part:

    sample = -sum(p log p) / M        batch = -sum(a log(a + epsilon))        0 log 0 = 0

|u|^2 is the same for all codes of a row, and is left out of the logits: (2 u c - |c|^2) / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._vectors import through_unit, unit


def codebook_entropy(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample and batch entropy, and what the backward takes: mean (K,), the rows' entropies (N,), the maximum of a
    row's logits and its sum of exp(logits - maximum) (2, N), and M, at least 1. Rows that are masked are 0.
    """
    logits, taking = (
        _logits(_rows(z, mask, metric), _codes(codebook, metric), temperature),
        _flat(mask),
    )
    log_p = logits.log_softmax(-1)
    entropy = _masked(-_product(log_p.exp(), log_p).sum(-1), taking)
    count = logits.new_full((), len(logits)) if taking is None else taking.sum().to(logits.dtype)
    count = count.clamp(min=1)
    mean = (log_p.exp() if taking is None else _masked(log_p.exp(), taking[:, None])).sum(0) / count
    batch = -_product(mean, (mean + epsilon).log()).sum()
    largest = logits.amax(-1)
    normalizer = torch.stack([largest, (logits - largest[:, None]).exp().sum(-1)])
    return entropy.sum() / count, batch, mean, entropy, _masked(normalizer, taking), count


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
    """Gradients of z and codebook, empty where they are not wanted.

    dlogits = -p (dsample (log p + entropy) + dbatch (s - p . s)) / M with s = log(a + epsilon) + a / (a + epsilon).
    -d = -|u - c|^2 has the gradient 2 (c - u): a row's dlogits sum to 0, but for rounding, and u may be large.

    A gradient that is None is zero. A code without probability, a = 0, has no gradient: p <= M a, so p log a goes to 0.
    """
    u, codes = _rows(z, mask, metric), _codes(codebook, metric)
    log_p = _logits(u, codes, temperature).log_softmax(-1)
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_sample is not None:
        grad = grad - grad_sample * _product(p, log_p + entropy[:, None])
    if grad_batch is not None:
        slope = slopes(mean, epsilon)
        grad = grad - grad_batch * p * (slope - (p @ slope)[:, None])
    grad = grad * (2 / (temperature * count))
    if mask is not None:
        grad = _masked(grad, mask.flatten()[:, None])
    grad_z, grad_codebook = z.new_empty(0), codebook.new_empty(0)
    if z_wanted:
        grad_u = (grad @ codes - grad.sum(1, keepdim=True) * u).view(z.shape)
        grad_u = through_unit(grad_u, z) if metric == "cosine" else grad_u
        grad_z = _masked(grad_u, None if mask is None else mask[..., None]).to(z.dtype)
    if codebook_wanted:
        grad_codes = grad.t() @ u - grad.sum(0)[:, None] * codes
        grad_codes = through_unit(grad_codes, codebook) if metric == "cosine" else grad_codes
        grad_codebook = grad_codes.to(codebook.dtype)
    return grad_z, grad_codebook


def slopes(mean: Tensor, epsilon: float) -> Tensor:
    """Slopes d (a log(a + epsilon)) / d a of the means a (K,), 0 where a is 0."""
    slope = (mean + epsilon).log() + mean / (mean + epsilon)
    return torch.where(mean == 0, 0.0, slope)


def _rows(z: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """Vectors as rows (N, D), normalized under "cosine", 0 where masked."""
    rows = z.reshape(z.shape[:-1].numel(), z.shape[-1])
    return _codes(rows if mask is None else _masked(rows, mask.flatten()[:, None]), metric)


def _codes(x: Tensor, metric: str) -> Tensor:
    return unit(x) if metric == "cosine" else x.to(accumulation_dtype(x))


def _logits(u: Tensor, codes: Tensor, temperature: float) -> Tensor:
    return (2 * u @ codes.t() - codes.square().sum(-1)) / temperature


def _product(p: Tensor, x: Tensor) -> Tensor:
    """Product p x, 0 where p is 0 and x may be infinite."""
    return torch.where(p == 0, 0.0, p * x)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()
