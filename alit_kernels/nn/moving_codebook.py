"""The codebook of a vector quantizer as a module: its state, and its changes by moving averages and restarts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import check_flag, check_number, check_tensor
from ..codebook_statistics import codebook_statistics
from . import checkpointing
from .codebook import AsItWas, Codebook, ReplacedRows, random_vectors
from .distributed import Group, Reduction


class MovingCodebook(nn.Module):
    """Base of :class:`alit_kernels.nn.VectorQuantizer`, whose docstring names state and options.

    It takes vectors as they are averaged, (N, D) float32.
    """

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        ema_decay: float | None,
        ema_epsilon: float,
        ema_rewrites_all: bool,
        dead_code_threshold: float,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if ema_decay is not None and not 0 <= check_number("ema_decay", ema_decay) < 1:
            raise ValueError(f"ema_decay: expected None or a number in [0, 1), got {ema_decay}")
        if check_number("ema_epsilon", ema_epsilon) < 0:
            raise ValueError(f"ema_epsilon: expected at least 0, got {ema_epsilon}")
        check_flag("ema_rewrites_all", ema_rewrites_all)
        if not 0 <= check_number("dead_code_threshold", dead_code_threshold) < 1:
            raise ValueError(
                f"dead_code_threshold: expected a number in [0, 1), got {dead_code_threshold}"
            )
        super().__init__()
        self.ema_decay, self.ema_epsilon = ema_decay, ema_epsilon
        self.ema_rewrites_all, self.dead_code_threshold = ema_rewrites_all, dead_code_threshold
        self._group = Group(process_group)
        self._pending: Reduction | None = None
        self.embedding: nn.Embedding | Codebook
        if ema_decay is not None:
            self.embedding = Codebook(torch.empty(num_codes, dim))
        else:
            self.embedding = (ReplacedRows if self._counts else nn.Embedding)(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if ema_decay is not None:
            self.register_buffer("embed_avg", self.embedding.weight.detach().clone())
        if self._counts:
            self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_state_dict_pre_hook(_finish_update)
        self.register_load_state_dict_pre_hook(_before_loading)

    @property
    def num_codes(self) -> int:
        return self.embedding.weight.shape[0]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self._group.group

    @property
    def _counts(self) -> bool:
        return self.ema_decay is not None or self.dead_code_threshold > 0

    def _codebook(self, z: Tensor) -> tuple[Tensor, bool]:
        """Codebook that this call searches for the rows ``z``, and True if the call updates the moving averages."""
        weight = self.embedding.weight
        eager, records = not torch.compiler.is_compiling(), torch.is_grad_enabled()
        if not (self._counts and self.training):
            self.finish_update()
            return weight, False
        if not eager:
            checkpointing.refuse_compiled_region()
        region = checkpointing.region() if eager else None
        if eager and checkpointing.in_backward() and (records or region is not None):
            if self.dead_code_threshold > 0 and z.numel():
                torch.rand(self.num_codes, device=z.device)  # as the first run drew
            seen = checkpointing.recall(self)
            return AsItWas.apply(weight, seen) if weight.requires_grad else seen, False
        self.finish_update()
        if not records and region is None:
            return weight, False
        # The backward needs the codebook as it was before the update, which happens in place.
        codebook = weight.clone()
        if region is not None:
            checkpointing.record(region, self, codebook.detach())
        return codebook, True

    @torch.no_grad()
    def _update(self, vectors: Tensor, index: Tensor, mask: Tensor | None) -> None:
        """Update by vectors (N, D), their codes (N,) and a mask (N,): at once, or in :meth:`finish_update`."""
        if not self._counts:
            raise RuntimeError("update_codebook: this codebook is learned by gradient alone")
        if self.cluster_size.dtype != torch.float32:
            raise TypeError(
                "update_codebook: moving averages are kept in float32, and the module was cast to"
                f" {str(self.cluster_size.dtype).removeprefix('torch.')}; use autocast instead"
            )
        parts = list(codebook_statistics(index, vectors, self.num_codes, mask=mask))
        if torch.compiler.is_compiling():
            parts[0] = checkpointing.not_recomputed(parts[0])
        if self.dead_code_threshold > 0:
            parts += random_vectors(vectors, mask, self.num_codes, self.process_group)
        reduction = Reduction(parts, self.process_group)
        if reduction.travels:
            self.finish_update()
            self._pending = reduction
        else:
            self._advance(*reduction.results())

    def finish_update(self) -> None:
        """Apply a pending update, whose statistics were still traveling between processes."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._advance(*pending.results())

    @torch.no_grad()
    def _advance(self, count: Tensor, total: Tensor, *candidates: Tensor) -> None:
        weight, size = self.embedding.weight, self.cluster_size
        decay = 0.99 if self.ema_decay is None else self.ema_decay
        if self.ema_decay is not None and not self.ema_rewrites_all:
            torch.mul(weight, size[:, None], out=self.embed_avg)
        size.lerp_(count, 1 - decay)
        if self.ema_decay is not None:
            self.embed_avg.lerp_(total, 1 - decay)
            smoothed, moves = size, count > 0
            if self.ema_rewrites_all:
                everything = size.sum()
                smoothed = size + self.ema_epsilon
                smoothed = smoothed / (everything + self.num_codes * self.ema_epsilon) * everything
                # Nothing counted yet (an empty or fully masked first batch): the codebook stays.
                moves = everything > 0
            averages = self.embed_avg / smoothed[:, None]
            torch.where(moves[..., None], averages, weight, out=weight)
        if candidates:
            offers, vectors = candidates
            mean = size.sum() / self.num_codes
            dead = (size < self.dead_code_threshold * mean) & (offers > 0)
            torch.where(dead[:, None], vectors, weight, out=weight)
            torch.where(dead, mean, size, out=size)
            if self.ema_decay is not None:
                torch.where(dead[:, None], vectors * mean, self.embed_avg, out=self.embed_avg)

    @torch.no_grad()
    def _set(self, weight: Tensor, count: Tensor) -> None:
        check_tensor("embedding.weight", self.embedding.weight)  # refuses a sharded one
        self.finish_update()
        self.embedding.weight.copy_(weight)
        if self._counts:
            self.cluster_size.copy_(count)
        if self.ema_decay is not None:
            self.embed_avg.copy_(self.embedding.weight * self.cluster_size[:, None])

    def __getstate__(self) -> dict[str, Any]:
        self.finish_update()
        return dict(self.__dict__)


def _finish_update(module: MovingCodebook, *_: Any) -> None:
    """Hook before the state is read: apply a pending update, which belongs to it."""
    module.finish_update()


def _before_loading(module: MovingCodebook, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Hook before loading: apply a pending update; give a state dict with a weight alone the count 1 for each code."""
    module.finish_update()
    weight = state.get(f"{prefix}embedding.weight")
    average, size = f"{prefix}embed_avg", f"{prefix}cluster_size"
    if average in state or size in state or not isinstance(weight, Tensor) or not weight.ndim:
        return
    if module._counts:
        state[size] = torch.ones(weight.shape[0], device=weight.device)
    if module.ema_decay is not None:
        state[average] = weight.float()
