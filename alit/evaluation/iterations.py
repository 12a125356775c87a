"""Contribution of each iteration: codebook usage of the tokens that it added, and the error without them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import AdaptiveTokenizerConfig
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from .metrics import codebook_usage, eight_bits, l1
from .results import IterationQuality


class IterationMeasures:
    """Accumulator of :class:`IterationQuality`: codes are counted by iteration, since each may have its own codebook.

    Replacement codes are drawn from the whole codebook, with a fixed seed.
    """

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        self.step, self.codes = config.latents_per_iteration, config.codebook_size
        self.counts = torch.zeros(config.iterations, self.codes, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(0)
        self.replaced: list[Tensor] = []

    def add(
        self, model: AdaptiveTokenizer, images: Tensor, index_BL: Tensor, *, truncated: bool
    ) -> None:
        """Count codes of images (B, 3, height, width), (B, L) int64 on the CPU; measure L1 with some replaced."""
        random_BL = torch.randint(self.codes, index_BL.shape, generator=self.generator)
        lengths = torch.full((len(index_BL),), index_BL.shape[1])
        errors = []
        for iteration, count in enumerate(self.counts):
            part = slice(iteration * self.step, (iteration + 1) * self.step)
            count += torch.bincount(index_BL[:, part].flatten(), minlength=self.codes)
            changed_BL = index_BL.clone()
            changed_BL[:, part] = random_BL[:, part]
            shown = model.decode(TokenSequence(lengths, indices=changed_BL.flatten()))
            assert isinstance(shown, Tensor)  # of one size
            errors.append(l1(images, eight_bits(shown, truncated=truncated).cpu()).double())
        self.replaced.append(torch.stack(errors, dim=1))

    def result(self) -> list[IterationQuality]:
        """Quality of each iteration; empty if nothing was added."""
        if not self.replaced:
            return []
        replaced = torch.cat(self.replaced).mean(0).tolist()
        return [
            IterationQuality(i * self.step, (i + 1) * self.step - 1, *codebook_usage(count), error)
            for i, (count, error) in enumerate(zip(self.counts, replaced, strict=True))
        ]
