"""The ops as commonly written in eager PyTorch, with full matrices of distances, scores and one-hots."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize, one_hot

from alit_kernels import CodebookEntropy, SoftCode, VectorQuantized


def nearest_codeword(z: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the nearest codeword of z (N, D) in a codebook (K, D): argmin of the expanded squared distances."""
    squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (squares - 2 * (z @ codebook.t())).argmin(1)


def statistics_with_one_hot(index: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Number (K,) and sum (K, D) of the vectors z (N, D) of each code, as products with a one-hot matrix."""
    matrix = one_hot(index, codes).to(z.dtype)
    return matrix.sum(0), matrix.t() @ z


def statistics_with_index_add(index: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Number (K,) and sum (K, D) of the vectors z (N, D) of each code, by ``index_add_``."""
    count = torch.zeros(codes, device=z.device).index_add_(0, index, torch.ones_like(z[:, 0]))
    return count, torch.zeros(codes, z.shape[1], device=z.device).index_add_(0, index, z)


def vector_quantize(
    z: Tensor, codebook: Tensor, metric: str, commitment: float = 0.25, with_one_hot: bool = True
) -> VectorQuantized:
    """Vector quantization of z (..., D); codes are looked up by a product with a one-hot matrix, or gathered."""
    u, e = (normalize(t, dim=-1) if metric == "cosine" else t for t in (z, codebook))
    index = nearest_codeword(u.flatten(0, -2), e)
    q = (one_hot(index, len(e)).to(e.dtype) @ e if with_one_hot else e[index]).view(z.shape)
    codebook_loss = mse_loss(q, u.detach())
    commitment_loss = commitment * mse_loss(q.detach(), u)
    loss = commitment_loss + codebook_loss
    straight_through = u + (q - u).detach()
    return VectorQuantized(
        straight_through, index.view(z.shape[:-1]), loss, commitment_loss, codebook_loss
    )


def codebook_entropy(
    z: Tensor, codebook: Tensor, *, temperature: float, metric: str, epsilon: float
) -> CodebookEntropy:
    """Mean sample entropy and batch entropy of the code distributions of z (N, D), from all N x K distances."""
    u, e = (normalize(t, dim=-1) if metric == "cosine" else t for t in (z, codebook))
    logits = -(u.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * (u @ e.t())) / temperature
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = p.mean(0)
    return CodebookEntropy(-(p * log_p).sum(-1).mean(), -(mean * (mean + epsilon).log()).sum())


def soft_codebook(logits: Tensor, codebook: Tensor, target: Tensor) -> SoftCode:
    """Expected code, negative log-likelihood and target probability, with a separate softmax for each."""
    code = logits.softmax(-1) @ codebook
    nll = cross_entropy(logits, target, reduction="none")
    return SoftCode(code, nll, logits.softmax(-1).gather(1, target[:, None])[:, 0])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (B, H, N, D), scores kept for the backward; ``mask`` (bool) broadcasts to (B, H, N, N)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v
