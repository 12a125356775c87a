"""Training of the base tokenizer alone: mean absolute pixel error and the base's own regulariser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ..base import BaseTokenizer
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .optimisation import MovingAverage, Optimiser
from .processes import Processes, distributed, synchronised
from .stage1 import add_terms, precision


class BaseModule(nn.Module):
    """Base tokenizer and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, base: BaseTokenizer, regulariser: float) -> None:
        super().__init__()
        self.base, self.regulariser = base, regulariser

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms by name."""
        pixels, term = self.base.autoencode(images)
        error = l1_loss(pixels.float(), images.float())
        loss = error + self.regulariser * term.float()
        terms = {"loss": loss, "l1": error, "regulariser": term}
        return loss, {name: value.detach() for name, value in terms.items()}


class BaseStage:
    """What the training loop needs of a stage (see :class:`.stage1.Stage1`); only the base tokenizer learns."""

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        if config.parallel == "fsdp":
            raise ValueError("parallel: expected ddp in stage base, got fsdp")
        self.model = model
        self.autocast = precision(config.precision, own.device)
        model.eval().requires_grad_(False)
        base = model.base_tokenizer.train().requires_grad_(True)
        trained = [(f"base_tokenizer.{name}", p) for name, p in base.named_parameters()]
        if not trained:
            raise ValueError(f"base: a {model.config.base.kind} base tokenizer has no weights")
        self.module = distributed(BaseModule(base, config.regulariser), [], own, config.parallel)
        self.average = MovingAverage(trained, config.ema)
        self.optimisers = {"base": Optimiser(trained, config)}
        self.modules: dict[str, nn.Module] = {"model": model}

    def step(
        self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One optimiser step on a batch in parts; returns the terms, on the device."""
        sums: dict[str, Tensor] = {}
        for number, images in enumerate(parts, 1):
            with synchronised(self.module, last=number == len(parts)):
                with self.autocast():
                    loss, terms = self.module(images)
                (loss / len(parts)).backward()
            add_terms(sums, terms, len(parts))
        sums["gradient_norm"] = self.optimisers["base"].step(learning_rate)
        self.average.update(step + 1)
        return sums

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """The images as the base tokenizer alone gives them back."""
        base, config = self.model.base_tokenizer, self.model.config
        return [base.pixels(base.encode(images).code_BNC.float(), config.grid)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode and this run's precision, for a look at the model within a run."""
        self.model.base_tokenizer.eval()
        try:
            with self.autocast(), torch.no_grad():
                yield
        finally:
            self.model.base_tokenizer.train()
