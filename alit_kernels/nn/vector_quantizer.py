"""Vector quantizer with a learned or a moving-average codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codebook_statistics import codebook_statistics
from ..nearest_codeword import METRICS
from ..nearest_codeword.reference import unit
from ..vector_quantize import VectorQuantized, vector_quantize


class VectorQuantizer(nn.Module):
    """Nearest-codeword quantizer (VQ-VAE, van den Oord et al., 2017).

    Args:
        num_codes: K.
        dim: D.
        metric: "euclidean" or "cosine".
        commitment: weight of the commitment loss.
        ema_decay: None for a codebook learned by gradient; else the decay of its exponential moving average.
        ema_epsilon: smoothing of the counts.

    State: ``embedding.weight`` (K, D) float32, a parameter, or with EMA a tensor without gradient beside the buffers
    ``cluster_size`` (K,) and ``embed_avg`` (K, D).
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        metric: str = "euclidean",
        commitment: float = 0.25,
        ema_decay: float | None = None,
        ema_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: expected None or a number in [0, 1), got {ema_decay}")
        self.cluster_size: Tensor
        self.embed_avg: Tensor
        self.metric, self.commitment = metric, commitment
        self.ema_decay, self.ema_epsilon = ema_decay, ema_epsilon
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("cluster_size", torch.zeros(num_codes))
            self.register_buffer("embed_avg", self.embedding.weight.detach().clone())

    @property
    def num_codes(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, z: Tensor, mask: Tensor | None = None) -> VectorQuantized:
        """Quantize (..., D) vectors; in training mode with EMA and gradients the codebook is updated after.

        With EMA the codebook receives no gradient, so ``loss`` is the commitment loss alone. ``mask`` (...) is True
        where a vector takes part.
        """
        updates = self.ema_decay is not None and self.training and torch.is_grad_enabled()
        # The backward needs the codebook as it was before the update, which happens in place.
        codebook = self.embedding.weight.clone() if updates else self.embedding.weight
        result = vector_quantize(
            z, codebook, metric=self.metric, commitment=self.commitment, mask=mask
        )
        if self.ema_decay is None:
            return result
        if updates:
            self.update_codebook(z, result.index, mask)
        return result._replace(loss=result.commitment_loss)

    @torch.no_grad()
    def update_codebook(self, z: Tensor, index: Tensor, mask: Tensor | None = None) -> None:
        """One step of the moving average with the vectors ``z`` (..., D) and their codes ``index`` (...).

        N <- a N + (1 - a) n, m <- a m + (1 - a) s, weight = m / smoothed(N), with n and s the count and the sum of the
        (normalised) vectors of each code; Laplace smoothing as in van den Oord et al., 2017, appendix A.1.
        """
        assert self.ema_decay is not None, "the codebook is learned by gradient"
        vectors = unit(z) if self.metric == "cosine" else z.float()
        count, total = codebook_statistics(
            index.flatten(),
            vectors.flatten(0, -2),
            self.num_codes,
            mask=None if mask is None else mask.flatten(),
        )
        self.cluster_size.lerp_(count, 1 - self.ema_decay)
        self.embed_avg.lerp_(total, 1 - self.ema_decay)
        everything = self.cluster_size.sum()
        smoothed = self.cluster_size + self.ema_epsilon
        smoothed = smoothed / (everything + self.num_codes * self.ema_epsilon) * everything
        # Nothing counted yet (an empty or fully masked first batch): the codebook stays.
        updated = torch.where(
            everything > 0, self.embed_avg / smoothed[:, None], self.embedding.weight
        )
        self.embedding.weight.copy_(updated)

    def codes(self, index: Tensor) -> Tensor:
        """Codebook rows (..., D) of ``index`` (...), as ``forward`` returns them: normalised under "cosine"."""
        rows = self.embedding(index)
        return unit(rows) if self.metric == "cosine" else rows
