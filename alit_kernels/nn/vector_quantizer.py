"""Vector quantizer with a learned or a moving-average codebook."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import check_choice, check_count, check_tensor
from ..codebook_statistics import codebook_statistics
from ..nearest_codeword import METRICS, nearest_codeword
from ..nearest_codeword.reference import unit
from ..vector_quantize import VectorQuantized, vector_quantize
from .distributed import Reduction, broadcast, world


class CodebookUsage(NamedTuple):
    """What :meth:`VectorQuantizer.usage` returns, as tensors: nothing waits for the device.

    Attributes:
        count: (K,) float32, vectors of each code.
        fraction: scalar, codes that received a vector, of all.
        perplexity: scalar, ``exp`` of the entropy of the counts in nats: the number of codes in equally frequent use.
    """

    count: Tensor  # type: ignore[assignment]
    fraction: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-codeword quantizer (VQ-VAE, van den Oord et al., 2017).

    Args:
        num_codes: K.
        dim: D.
        metric: "euclidean" or "cosine".
        commitment: weight of the commitment loss.
        ema_decay: None for a codebook learned by gradient; else the decay of its exponential moving average.
        ema_epsilon: smoothing of the counts.
        dead_code_threshold: in training, a code whose moving-average count falls below this fraction of the mean count
            is replaced by a random vector of the batch, with the mean count (random restarts, Dhariwal et al., 2020).
            0 replaces none. The decay is ``ema_decay``; for a learned codebook it is 0.99, and the optimiser's state of
            a replaced row stays.
        channel_dim: -1 for (..., D) input such as (B, N, C), 1 for (B, C, H, W).
        process_group: the processes whose statistics are summed; None for all of ``torch.distributed``, where that is
            initialised. The sum travels while the step goes on, and is applied at the next call of the module, or
            where its state is read: no process waits within a step. Compiled, it is applied at once.

    State: ``embedding.weight`` (K, D) float32, a parameter, or with EMA a tensor without gradient beside the buffer
    ``embed_avg`` (K, D). With EMA or a threshold also the buffer ``cluster_size`` (K,).

    Raises:
        TypeError, ValueError: an option out of range. In training, TypeError where the moving averages are no longer
            float32: ``module.bfloat16()`` would lose them, autocast does not.
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
        dead_code_threshold: float = 0.0,
        channel_dim: int = -1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_count("num_codes", num_codes, minimum=1)
        check_count("dim", dim, minimum=1)
        check_choice("metric", metric, METRICS)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: expected None or a number in [0, 1), got {ema_decay}")
        if not 0 <= dead_code_threshold < 1:
            raise ValueError(
                f"dead_code_threshold: expected a number in [0, 1), got {dead_code_threshold}"
            )
        if channel_dim not in (-1, 1):
            raise ValueError(f"channel_dim: expected -1 or 1, got {channel_dim}")
        self.cluster_size: Tensor
        self.embed_avg: Tensor
        self.metric, self.commitment = metric, commitment
        self.ema_decay, self.ema_epsilon = ema_decay, ema_epsilon
        self.dead_code_threshold, self.channel_dim = dead_code_threshold, channel_dim
        self.process_group = process_group
        self._pending: Reduction | None = None
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("embed_avg", self.embedding.weight.detach().clone())
        if self._counts:
            self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_state_dict_pre_hook(_finish_update)
        self.register_load_state_dict_pre_hook(_finish_update)

    @property
    def num_codes(self) -> int:
        return self.embedding.num_embeddings

    @property
    def _counts(self) -> bool:
        return self.ema_decay is not None or self.dead_code_threshold > 0

    def forward(self, z: Tensor, mask: Tensor | None = None) -> VectorQuantized:
        """Quantize vectors; in training mode with gradients enabled, the moving averages are updated after.

        Args:
            z: (..., D), or (B, D, H, W) with ``channel_dim=1``.
            mask: (...) or (B, H, W) bool, True where a vector takes part.

        Returns:
            :class:`VectorQuantized` with ``quantized`` in the layout of ``z``. With EMA the codebook receives no
            gradient, so ``loss`` is the commitment loss alone.
        """
        self.finish_update()
        updates = self._counts and self.training and torch.is_grad_enabled()
        # The backward needs the codebook as it was before the update, which happens in place.
        codebook = self.embedding.weight.clone() if updates else self.embedding.weight
        z = z.movedim(self.channel_dim, -1)
        result = vector_quantize(
            z, codebook, metric=self.metric, commitment=self.commitment, mask=mask
        )
        if updates:
            self.update_codebook(z, result.index, mask)
        loss = result.loss if self.ema_decay is None else result.commitment_loss
        return VectorQuantized(  # not _replace, which torch 2.11 does not compile
            result.quantized.movedim(-1, self.channel_dim),
            result.index,
            loss,
            result.commitment_loss,
            result.codebook_loss,
        )

    @torch.no_grad()
    def update_codebook(self, z: Tensor, index: Tensor, mask: Tensor | None = None) -> None:
        """One step of the moving averages with the vectors ``z`` (..., D) and their codes ``index`` (...).

        N <- a N + (1 - a) n, m <- a m + (1 - a) s, weight = m / smoothed(N), with n and s the count and the sum of the
        (normalised) vectors of each code; Laplace smoothing as in van den Oord et al., 2017, appendix A.1.
        """
        if not self._counts:
            raise RuntimeError("update_codebook: this codebook is learned by gradient alone")
        if self.cluster_size.dtype != torch.float32:
            raise TypeError(
                "update_codebook: moving averages are kept in float32, and the module was cast to"
                f" {str(self.cluster_size.dtype).removeprefix('torch.')}; use autocast instead"
            )
        vectors, index, mask = self._vectors(z), index.flatten(), _flat(mask)
        parts = list(codebook_statistics(index, vectors, self.num_codes, mask=mask))
        if self.dead_code_threshold > 0:
            parts += self._candidates(vectors, mask)
        reduction = Reduction(parts, self.process_group)
        if reduction.travels:
            self._pending = reduction
        else:
            self._advance(*reduction.results())

    def finish_update(self) -> None:
        """Apply statistics that were still travelling between processes."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._advance(*pending.results())

    @torch.no_grad()
    def _advance(self, count: Tensor, total: Tensor, *candidates: Tensor) -> None:
        weight = self.embedding.weight
        decay = 0.99 if self.ema_decay is None else self.ema_decay
        self.cluster_size.lerp_(count, 1 - decay)
        everything = self.cluster_size.sum()
        if self.ema_decay is not None:
            self.embed_avg.lerp_(total, 1 - decay)
            smoothed = self.cluster_size + self.ema_epsilon
            smoothed = smoothed / (everything + self.num_codes * self.ema_epsilon) * everything
            # Nothing counted yet (an empty or fully masked first batch): the codebook stays.
            weight.copy_(torch.where(everything > 0, self.embed_avg / smoothed[:, None], weight))
        if candidates:
            offers, vectors = candidates
            mean = everything / self.num_codes
            dead = (self.cluster_size < self.dead_code_threshold * mean) & (offers > 0)
            weight.copy_(torch.where(dead[:, None], vectors, weight))
            self.cluster_size.copy_(torch.where(dead, mean, self.cluster_size))
            if self.ema_decay is not None:
                self.embed_avg.copy_(torch.where(dead[:, None], vectors * mean, self.embed_avg))

    def _candidates(self, vectors: Tensor, mask: Tensor | None) -> list[Tensor]:
        """A random vector that takes part for each code: offers (K,), vectors (K, D). Processes take codes in turn."""
        rank, processes = world(self.process_group)
        rows, device = vectors.shape[0], vectors.device
        if rows == 0:
            return [
                torch.zeros(self.num_codes, device=device),
                torch.zeros_like(self.embedding.weight),
            ]
        chance = torch.rand(self.num_codes, device=device)
        if mask is None:
            chosen = (chance * rows).long().clamp(max=rows - 1)
            some = torch.ones((), device=device, dtype=torch.bool)
        else:
            # Rows that take part first; their number stays on the device.
            used = mask.sum()
            place = torch.minimum((chance * used).long(), (used - 1).clamp(min=0))
            chosen, some = (~mask).to(torch.int8).argsort(stable=True)[place], used > 0
        mine = some & (torch.arange(self.num_codes, device=device) % processes == rank)
        return [mine.float(), torch.where(mine[:, None], vectors[chosen], 0.0)]

    @torch.no_grad()
    def initialize(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        iterations: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set the codebook by k-means (Lloyd's algorithm, spherical under "cosine") of sample vectors.

        Starts from random vectors; a code that no vector chooses keeps its place. Processes of a group cluster their
        vectors together. Meant for once before training: ``mask`` is read on the host.

        Args:
            z: vectors in the layout of :meth:`forward`, at least one of them (not masked).
            mask: True where a vector takes part.
            iterations: of Lloyd's algorithm.
            generator: of the start, on the device of ``z``.

        Raises:
            ValueError: no vectors.
        """
        check_count("iterations", iterations)
        self.finish_update()
        vectors = self._vectors(z.movedim(self.channel_dim, -1))
        vectors = vectors if mask is None else vectors[mask.flatten()]
        if vectors.shape[0] == 0:
            raise ValueError("z: expected at least 1 vector that is not masked, got none")
        order = torch.randperm(vectors.shape[0], generator=generator, device=vectors.device)
        repeats = -(-self.num_codes // vectors.shape[0])
        centres = vectors[order.repeat(repeats)[: self.num_codes]]
        broadcast(centres, self.process_group)
        count = torch.zeros(self.num_codes, device=centres.device)
        for _ in range(iterations):
            index = nearest_codeword(vectors, centres)
            parts = list(codebook_statistics(index, vectors, self.num_codes))
            count, total = Reduction(parts, self.process_group).results()
            means = total / count.clamp(min=1)[:, None]
            means = unit(means) if self.metric == "cosine" else means
            centres = torch.where(count[:, None] > 0, means, centres)
        self.embedding.weight.copy_(centres)
        if self._counts:
            self.cluster_size.copy_(count)
        if self.ema_decay is not None:
            self.embed_avg.copy_(centres * count[:, None])

    def _vectors(self, z: Tensor) -> Tensor:
        """What is averaged: (N, D) float32, normalised under "cosine"."""
        check_tensor("z", z, shape=(*[None] * (z.ndim - 1), self.embedding.embedding_dim))
        rows = z.detach().flatten(0, -2)
        return unit(rows) if self.metric == "cosine" else rows.float()

    @torch.no_grad()
    def usage(self, index: Tensor, mask: Tensor | None = None) -> CodebookUsage:
        """How evenly ``index`` (...) uses the codebook, where ``mask`` (...) is True; of this process alone."""
        ones = torch.ones(1, 1, device=index.device).expand(index.numel(), 1)
        count, _ = codebook_statistics(index.flatten(), ones, self.num_codes, mask=_flat(mask))
        share = count / count.sum().clamp(min=1)
        return CodebookUsage(
            count, (count > 0).float().mean(), torch.special.entr(share).sum().exp()
        )

    def codes(self, index: Tensor) -> Tensor:
        """Codebook rows (..., D) of ``index`` (...), as ``forward`` finds them: normalised under "cosine"."""
        self.finish_update()
        rows = self.embedding(index)
        return unit(rows) if self.metric == "cosine" else rows

    def __getstate__(self) -> dict[str, Any]:
        self.finish_update()
        return dict(self.__dict__)


def _finish_update(module: VectorQuantizer, *_: Any) -> None:
    """Before its state is read, and before it is replaced: what still travels belongs to the state there was."""
    module.finish_update()


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()
