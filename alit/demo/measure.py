"""Measurements that the page shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention_maps import latent_attention
from ..console import reported
from ..evaluation.metrics import bits_per_token, eight_bits, l1, thumbnail, tokens_needed
from ..pixel_errors import l1_of
from ..tokenizer import AdaptiveTokenizer

#: Photographs of a batch.
BATCH = 4


@dataclass(frozen=True)
class Measured:
    """Measurements of B photographs at K lengths, from plain to busy: fewer tokens first, then smaller errors.

    Attributes:
        names, images: the photographs; (B, 3, height, width) in [0, 1].
        lengths, bits: K numbers of tokens, and their bits. Continuous tokens count 16 bits a channel.
        pixels, thumbnails: (K, B, 3, height, width), reconstructions and thumbnails of as many bits, in 8 bits.
        max_l1: the error at which tokens are counted.
        tokens: (B,) int64, of the first iteration whose error is below ``max_l1``; all where none is.
        reached: (B,) bool, True if so many tokens meet ``max_l1``; where they do not, they are all there are.
        attention: (B, L, rows, columns) as :func:`alit.attention_maps.latent_attention` gives it; L = ``lengths[-1]``.
    """

    names: list[str]
    images: Tensor
    lengths: list[int]
    bits: list[float]
    pixels: Tensor
    thumbnails: Tensor
    max_l1: float
    tokens: Tensor
    reached: Tensor
    attention: Tensor

    @property
    def l1(self) -> Tensor:
        """Mean absolute pixel errors of the reconstructions, (K, B)."""
        return l1(self.pixels, self.images)

    @property
    def thumbnail_l1(self) -> Tensor:
        """Mean absolute pixel errors of the thumbnails, (K, B)."""
        return l1(self.thumbnails, self.images)


@torch.no_grad()
def measure(
    model: AdaptiveTokenizer, photos: dict[str, Tensor], *, max_l1: float = 0.08
) -> Measured:
    """Run the model on photographs (3, height, width) by name."""
    images = torch.stack(list(photos.values()))
    batches = reported(images.split(BATCH), "encoding and decoding", len(images), size=len)
    parts = [_rollout(model, batch) for batch in batches]
    pixels, errors, attention = (
        torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (1, 1, 0), strict=True)
    )
    config = model.config
    bits = [length * bits_per_token(config) for length in config.lengths]
    tokens, reached = tokens_needed(errors.T, config.lengths, max_l1)
    order = sorted(range(len(images)), key=lambda b: (int(tokens[b]), float(errors[-1, b])))
    small = torch.stack([thumbnail(images, count) for count in bits])
    return Measured(
        names=[list(photos)[b] for b in order],
        images=images[order],
        lengths=config.lengths,
        bits=bits,
        pixels=pixels[:, order],
        thumbnails=small[:, order],
        max_l1=max_l1,
        tokens=tokens[order],
        reached=reached[order],
        attention=attention[order],
    )


def _rollout(model: AdaptiveTokenizer, images: Tensor) -> tuple[Tensor, ...]:
    """Pixels (K, B, 3, height, width) and L1 errors (K, B) of each of K iterations, attention maps; on the CPU."""
    images = images.to(model.latent_tokens.device)
    pixels, errors = [], []
    for iteration in model.rollout(images):
        assert iteration.prediction is not None
        decoded = model.pixels(iteration.prediction)
        pixels.append(eight_bits(decoded).cpu())
        errors.append(l1_of(decoded, images).cpu())
    return torch.stack(pixels), torch.stack(errors), latent_attention(model, images).cpu()
