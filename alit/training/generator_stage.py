"""Training of a generator on token sequences: cross-entropy of the next token, or of masked ones."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..generation import Generator, sample
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import Terms
from .processes import Processes
from .stage import Stage


class GeneratorModule(nn.Module):
    """Generator and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, rows_BN: Tensor) -> tuple[Tensor, Terms]:
        """Loss in nats per token, and its terms by name; rows are those of :class:`.token_files.TokenRows`."""
        label_B, token_BN = rows_BN[:, 0], rows_BN[:, 1:]
        length_B = (token_BN >= 0).sum(1)
        token_BN = token_BN[:, : int(length_B.max())]
        terms = self._next if self.generator.config.causal else self._masked
        loss = terms(label_B, token_BN, length_B)
        return loss, {"loss": loss.detach()}

    def _next(self, label_B: Tensor, token_BN: Tensor, length_B: Tensor) -> Tensor:
        """Cross-entropy of every token, and of the end behind the last, except where no more can follow."""
        generator, config = self.generator, self.generator.config
        rows = generator.packed(label_B, token_BN, length_B)
        following_BN = torch.cat([token_BN, token_BN.new_full((len(token_BN), 1), -1)], 1)
        following_BN.scatter_(1, length_B[:, None], config.codebook_size)
        inside = torch.arange(following_BN.shape[1], device=length_B.device) <= length_B[:, None]
        wanted = rows.position_T < config.max_tokens
        target_T, x_TC = following_BN[inside][wanted], generator.whole(rows)[wanted]
        return self._entropy(x_TC, rows.position_T[wanted], target_T)

    def _masked(self, label_B: Tensor, token_BN: Tensor, length_B: Tensor) -> Tensor:
        """Cross-entropy of masked tokens, cos(pi u / 2) of each image's, u uniform (MaskGIT, arXiv 2202.04200)."""
        generator, mask = self.generator, self.generator.config.codebook_size
        share_B = (math.pi / 2 * torch.rand(len(token_BN), device=token_BN.device)).cos()
        count_B = (length_B * share_B).ceil().clamp(min=1)
        inside = torch.arange(token_BN.shape[1], device=token_BN.device) < length_B[:, None]
        order_BN = torch.rand(token_BN.shape, device=token_BN.device).where(inside, 2)
        masked_BN = order_BN.argsort(1).argsort(1) < count_B[:, None]
        rows = generator.packed(label_B, token_BN.masked_fill(masked_BN, mask), length_B)
        x_MC, position_M = generator.whole(rows)[rows.masked_T], rows.position_T[rows.masked_T] - 1
        return self._entropy(x_MC, position_M, token_BN[masked_BN])

    def _entropy(self, x_TC: Tensor, position_T: Tensor, target_T: Tensor) -> Tensor:
        parts = [
            cross_entropy(logits.float(), target_T[rows], reduction="sum")
            for rows, logits in self.generator.scored(x_TC, position_T)
        ]
        return torch.stack(parts).sum() / len(target_T)


class GeneratorStage(Stage):
    """Training stage in which all of a generator learns.

    Raises:
        ValueError: a model of another kind; sharding, compilation or recomputation.
    """

    model: Generator

    def __init__(self, model: Generator, config: TrainingConfig, own: Processes) -> None:
        if not isinstance(model, Generator):
            raise ValueError(
                f"model: stage generator expects a Generator, got {type(model).__name__}"
            )
        for name, needed in (
            ("parallel", "ddp"),
            ("compile", False),
            ("activation_checkpointing", False),
        ):
            if (value := getattr(config, name)) != needed:
                raise ValueError(f"{name}: expected {needed} in stage generator, got {value}")
        model.train().requires_grad_(True)
        super().__init__(model, config, own, GeneratorModule(model))

    def originals(self, part: Tensor) -> Tensor:
        tokens = part[:, 1:]
        return self._decoded(TokenSequence((tokens >= 0).sum(1), tokens[tokens >= 0]))

    def reconstructions(self, part: Tensor) -> list[Tensor]:
        """Decoded samples of the generator, as many as rows."""
        return [self._decoded(sample(self.model, len(part)).tokens)]

    def _decoded(self, tokens: TokenSequence) -> Tensor:
        tokenizer = AdaptiveTokenizer.from_pretrained(Path(self.config.tokenizer))
        images = tokenizer.to(self.model.lengths.device).decode(tokens)
        assert isinstance(images, Tensor)  # all of one size
        return images
