"""Vector quantizer with a learned or a moving-average codebook."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import (
    FLOATING,
    check_choice,
    check_count,
    check_number,
    check_same,
    check_tensor,
    is_sharded,
    shown,
)
from .._vectors import unit
from ..codebook_statistics.op import check_index
from ..nearest_codeword import METRICS
from ..vector_quantize import VectorQuantized, vector_quantize
from .codebook import GRADIENTS, CodebookUsage, codebook_usage, k_means, rotated, taking_part
from .moving_codebook import MovingCodebook


class VectorQuantizer(MovingCodebook):
    """Nearest-codeword quantizer (VQ-VAE, van den Oord et al., 2017).

    Args:
        num_codes: K.
        dim: D.
        metric: "euclidean" or "cosine".
        commitment: weight of the commitment loss.
        codebook_weight: weight of the codebook loss. The ``legacy`` loss of taming-transformers with its ``beta`` is
            ``commitment=1.0, codebook_weight=beta``.
        gradient: of ``quantized`` to the (normalized) vector: "straight_through", or "rotation", the rotation and
            rescaling that takes the vector to its code (Fifty et al., 2024).
        ema_decay: None for a codebook learned by gradient; else the decay of its exponential moving average.
        ema_epsilon: smoothing of the counts with ``ema_rewrites_all``.
        ema_rewrites_all: each update writes every code anew as its average over its smoothed count, as van den Oord et
            al. do. These start at the codebook and at 0, so that codes without a vector grow at first. By default a
            code moves from where it is, and one without a vector in the step stays.
        dead_code_threshold: in training, a code whose moving-average count falls below this fraction of the mean count
            is replaced by a random vector of the batch, with the mean count (random restarts, Dhariwal et al., 2020).
            0 replaces none. The decay is ``ema_decay``; for a learned codebook it is 0.99, and the optimizer's state of
            a replaced row stays.
        channel_dim: -1 for (..., D) input such as (B, N, C), 1 for (B, C, H, W).
        process_group: the processes whose statistics are summed; None for all of ``torch.distributed``, where that is
            initialized. The sum travels while the step goes on, and is applied at the next call of the module, or
            where its state is read: no process waits within a step. Compiled, it is applied at once. A copy of the
            module has the same group; a pickle holds none, and what is read from it has the default one.

    Each forward in training mode updates the moving averages, unless gradients are disabled (``torch.no_grad``). Under
    ``torch.utils.checkpoint`` the first run updates, and the recomputation sees the codebook that the first one saw.

    State: ``embedding.weight`` (K, D) float32, a parameter, or with EMA a buffer beside the buffer ``embed_avg`` (K,
    D). With EMA or a threshold also the buffer ``cluster_size`` (K,). What is written into the weight counts: the next
    update starts there. A state dict that has the weight alone gives every code the count 1.

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
        codebook_weight: float = 1.0,
        gradient: str = "straight_through",
        ema_decay: float | None = None,
        ema_epsilon: float = 1e-5,
        ema_rewrites_all: bool = False,
        dead_code_threshold: float = 0.0,
        channel_dim: int = -1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_count("num_codes", num_codes, minimum=1)
        check_count("dim", dim, minimum=1)
        check_choice("metric", metric, METRICS)
        check_number("commitment", commitment)
        check_number("codebook_weight", codebook_weight)
        check_choice("gradient", gradient, GRADIENTS)
        if type(channel_dim) is not int or channel_dim not in (-1, 1):
            got = shown(channel_dim) if type(channel_dim) is int else type(channel_dim).__name__
            raise ValueError(f"channel_dim: expected -1 or 1, got {got}")
        super().__init__(
            num_codes,
            dim,
            ema_decay=ema_decay,
            ema_epsilon=ema_epsilon,
            ema_rewrites_all=ema_rewrites_all,
            dead_code_threshold=dead_code_threshold,
            process_group=process_group,
        )
        self.metric, self.gradient, self.channel_dim = metric, gradient, channel_dim
        self.commitment, self.codebook_weight = commitment, codebook_weight

    def forward(self, z: Tensor, mask: Tensor | None = None) -> VectorQuantized:
        """Quantize vectors; in training mode with gradients enabled, the moving averages are updated after.

        Args:
            z: (..., D), or (B, D, H, W) with ``channel_dim=1``; in the dtype of the codebook, or of 16 bits where that
                is float32, in which all is computed and returned.
            mask: (...), or (B, H, W) or (B, 1, H, W), bool, True where a vector takes part.

        Returns:
            :class:`VectorQuantized` with ``quantized`` in the layout of ``z`` and ``mask`` in that of ``index``. With
            EMA the codebook receives no gradient, so ``loss`` is the commitment loss alone.

        Raises:
            TypeError, ValueError: as :func:`vector_quantize`.
            RuntimeError: recomputed by a checkpoint that is not known: not torch's, or reentrant within another.
        """
        z, mask = self._rows(z), self._mask(mask)
        codebook, updates = self._codebook(z)
        result = vector_quantize(
            z,
            codebook,
            metric=self.metric,
            commitment=self.commitment,
            codebook_weight=self.codebook_weight,
            mask=mask,
        )
        if updates:
            self._update(self._vectors(z), result.index.flatten(), _flat(mask))
        quantized, index, loss, commitment_loss, codebook_loss, mask = result
        if self.gradient == "rotation":
            quantized = rotated(quantized, z, mask, self.metric)
        if self.ema_decay is not None:
            loss = commitment_loss
        if self.channel_dim == 1:
            quantized = quantized.movedim(-1, 1)
        # Not _replace, which torch 2.11 does not compile.
        return VectorQuantized(quantized, index, loss, commitment_loss, codebook_loss, mask)

    @torch.no_grad()
    def update_codebook(
        self, z: Tensor, index: Tensor | VectorQuantized, mask: Tensor | None = None
    ) -> None:
        """Update the moving averages by one step with vectors ``z`` and their codes.

        N <- a N + (1 - a) n, m <- a m + (1 - a) s, weight = m / N where n > 0, with n and s the count and the sum of
        the (normalized) vectors of each code, and m = N weight before. With ``ema_rewrites_all`` m is what it was, and
        weight = m / smoothed(N) everywhere: Laplace smoothing as in van den Oord et al., 2017, appendix A.1.

        Args:
            z: in the layout of :meth:`forward`.
            index: (...), or what :meth:`forward` returned, with its mask.
            mask: as for :meth:`forward`.
        """
        rows, mask = taking_part(index, self._mask(mask))
        self._update(self._vectors(self._rows(z)), rows.flatten(), _flat(mask))

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
        rows, mask = self._rows(z), self._mask(mask)
        vectors = self._vectors(rows)
        if mask is not None:
            check_tensor("mask", mask, shape=rows.shape[:-1])
            check_same("device", z=rows, mask=mask)
            vectors = vectors[mask.flatten()]
        if vectors.shape[0] == 0:
            raise ValueError("z: expected at least 1 vector that is not masked, got none")
        centers, count = k_means(
            vectors,
            self.num_codes,
            metric=self.metric,
            iterations=iterations,
            generator=generator,
            group=self.process_group,
        )
        self._set(centers, count)

    @torch.no_grad()
    def set_codebook(self, weight: Tensor) -> None:
        """Set the codebook to ``weight``, each code with the count 1.

        A count of 1 weighs as much as one vector: after a step with n vectors of a code, it has moved by
        (1 - a) n / (a + (1 - a) n) of the way to their mean. Meant for once before training: values are looked at.

        Args:
            weight: (K, D) floating point, finite.

        Raises:
            TypeError, ValueError: wrong dtype, shape or device, NaN or Inf.
        """
        shape = (self.num_codes, self.embedding.weight.shape[1])
        check_tensor("weight", weight, dtype=FLOATING, shape=shape)
        check_same("device", weight=weight, codebook=self.embedding.weight)
        if not bool(weight.isfinite().all()):
            raise ValueError("weight: expected finite values, got NaN or Inf")
        self._set(weight, torch.ones(self.num_codes))

    def _rows(self, z: Tensor) -> Tensor:
        """Vectors as (..., D), in float32 where the codebook is and ``z`` is of 16 bits."""
        check_tensor("z", z, dtype=FLOATING)
        dim, at = self.embedding.weight.shape[1], self.channel_dim
        if z.ndim < (2 if at == 1 else 1) or z.shape[at] != dim:
            layout = f"(B, {dim}, ...)" if at == 1 else f"(..., {dim})"
            raise ValueError(f"z: expected shape {layout}, got {tuple(z.shape)}")
        if at == 1:
            z = z.movedim(1, -1)
        narrow = z.dtype in (torch.bfloat16, torch.float16)
        return z.float() if narrow and self.embedding.weight.dtype == torch.float32 else z

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask (...), without the dimension for the channels that a mask (B, 1, H, W) has."""
        if mask is None:
            return None
        check_tensor("mask", mask, dtype=torch.bool)
        channels = self.channel_dim == 1 and mask.ndim == 4 and mask.shape[1] == 1
        return mask.squeeze(1) if channels else mask

    def _vectors(self, rows: Tensor) -> Tensor:
        """Vectors as they are averaged: (N, D) float32, normalized under "cosine"."""
        check_same("device", z=rows, codebook=self.embedding.weight)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        return unit(rows) if self.metric == "cosine" else rows.float()

    @torch.no_grad()
    def usage(self, index: Tensor | VectorQuantized, mask: Tensor | None = None) -> CodebookUsage:
        """Count, fraction and perplexity: the usage of the codebook by this process alone.

        Args:
            index: (...), or what :meth:`forward` returned, whose mask counts.
            mask: as for :meth:`forward`.
        """
        rows, mask = taking_part(index, self._mask(mask))
        return codebook_usage(rows.flatten(), _flat(mask), self.num_codes)

    def codes(self, index: Tensor | VectorQuantized, mask: Tensor | None = None) -> Tensor:
        """Codes of ``index``, in dtype and layout as ``forward`` returns them: normalized under "cosine".

        Args:
            index: (...), or what :meth:`forward` returned, whose mask counts.
            mask: as for :meth:`forward`; codes are 0 where it is False.

        Returns:
            (..., D), or (B, D, H, W) with ``channel_dim=1``. A sharded codebook is gathered: every process calls it.

        Raises:
            TypeError, ValueError: no integer tensor; on the CPU an index out of range.
        """
        index, mask = taking_part(index, self._mask(mask))
        check_same("device", codebook=self.embedding.weight, index=index)
        if index.is_cpu and not torch.compiler.is_compiling():
            check_index("index", index, self.num_codes)
        self.finish_update()
        weight: Any = self.embedding.weight
        rows = nn.functional.embedding(
            index, weight.full_tensor() if is_sharded(weight) else weight
        )
        rows = unit(rows).to(weight.dtype) if self.metric == "cosine" else rows
        rows = rows if mask is None else torch.where(mask[..., None], rows, 0.0)
        return rows.movedim(-1, 1) if self.channel_dim == 1 and rows.ndim > 1 else rows


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()
