"""Stage 1, latent distillation: one optimizer step on the published loss, base tokenizer frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..losses import stage1_loss
from ..losses.tails import check_tails
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import GradientGraph, Terms
from .processes import Processes
from .stage import AdaptiveStage, frozen_tokens, iterations_of


class Stage1Module(nn.Module):
    """Model and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        # Recomputed in the backward, all iterations' activations of the decoder at once would be too many.
        together = False if config.activation_checkpointing else None
        self.options: dict[str, Any] = {
            "through_time": config.through_time,
            "together": together,
            "tail_drop": config.tail_drop,
        }

    def forward(self, images: Tensor, at: Sequence[int]) -> tuple[Tensor, Terms]:
        """Loss (a scalar), and its terms by name, detached."""
        base = frozen_tokens(self.model, images)
        loss = stage1_loss(self.model, images, at=at, base=base, **self.options)
        terms = {"loss": loss.total.detach()}
        for index, iteration in loss.iterations.items():
            for name, value in iteration._asdict().items():
                if value is not None:
                    terms[f"{name}_{index}"] = value.detach()
        return loss.total, terms


class Stage1(AdaptiveStage):
    """Training stage 1: steps on the latent distillation loss, by a CUDA graph where that is wanted.

    Raises:
        ValueError: a model that cannot be sharded, or a step that cannot be captured; ``tail_drop``, and tokens that
            halt.
    """

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        check_tails(model, config.tail_drop)
        model.train()
        model.base_tokenizer.eval().requires_grad_(False)
        if model.pixel_filter is not None:  # no term of the loss is of pixels
            model.pixel_filter.requires_grad_(False)
        if config.cuda_graph:
            check_capturable(model, config, own)
        super().__init__(model, config, own, Stage1Module(model, config))
        self.graph: GradientGraph | None = None
        self.graph_at: list[int] = []

    def computation(
        self, step: int, done: float, parts: Sequence[Tensor]
    ) -> Callable[[Tensor], Terms]:
        at = iterations_of(self.config, self.model.config.iterations, step, done)

        def compute(images: Tensor) -> Terms:
            return self.gradients(self.module, len(parts), images, at)[0]

        if not self.config.cuda_graph:
            return compute
        if self.graph is None or self.graph_at != at:  # captured anew where the iterations change
            self.graph = None  # its memory goes before the next one takes its own
            self.graph, self.graph_at = GradientGraph(self.model, compute, parts[0]), at
        self.graph.zero_gradients()
        return self.graph


def check_capturable(model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
    """Check that a step of this run can be one CUDA graph; raises ``ValueError``."""
    if own.device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {own.device}")
    if own.count > 1 or config.parallel == "fsdp":
        raise ValueError(f"cuda_graph: expected one process, got {own.count} ({config.parallel})")
    if model.config.halting == "drop":
        raise ValueError(
            'cuda_graph: halting "drop" asks the device for lengths; expected "mask" or "off"'
        )
