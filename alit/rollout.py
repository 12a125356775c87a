"""The recurrent rollout: an iterator over iterations, from which finished images can leave.

Shape suffixes: B images still in the batch, N class and image tokens, L latents so far, D width, C code channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alit_kernels import VectorQuantized

from .base import BaseTokens, Prediction

if TYPE_CHECKING:
    from .tokenizer import AdaptiveTokenizer

#: Which tokens halt, given each one's probability of halting (B, N - 1): bool of the same shape.
HaltingDraw = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """Latents read out for the decoder.

    Attributes:
        codes_BLC: what the decoder gets: quantized, continuous, or (unfactorised) of the encoder's width.
        continuous_BLC: the same before normalisation and quantization.
        quantized: indices and losses; None where there is no quantizer.
    """

    codes_BLC: Tensor
    continuous_BLC: Tensor
    quantized: VectorQuantized | None


@dataclass(frozen=True, eq=False)
class Iteration:
    """State after one iteration.

    Attributes:
        index: 0 for the first.
        image_index_B: which of the images given to ``rollout`` these are.
        images: (B, 3, height, width).
        base: their base tokens.
        image_tokens_BND: class and image tokens as the encoder gave them, before halting.
        latents_BLD: latent tokens as the encoder gave them.
        bottleneck: the latents read out.
        prediction: the decoder's output, where it was asked for.
        halted: (B, N - 1) bool, the image tokens masked after this iteration; None where nothing halts.
    """

    index: int
    image_index_B: Tensor
    images: Tensor
    base: BaseTokens
    image_tokens_BND: Tensor
    latents_BLD: Tensor
    bottleneck: Bottleneck
    prediction: Prediction | None
    halted: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Latent tokens per image so far."""
        return self.latents_BLD.shape[1]

    @property
    def batch_size(self) -> int:
        return self.latents_BLD.shape[0]


class Rollout(Iterator[Iteration]):
    """Iterates over at most ``config.iterations`` iterations; see :meth:`alit.AdaptiveTokenizer.rollout`."""

    def __init__(
        self,
        model: AdaptiveTokenizer,
        images: Tensor,
        base: BaseTokens,
        *,
        predict_at: Collection[int] | None = None,
        halting_draw: HaltingDraw,
    ) -> None:
        self.model, self.images, self.base = model, images, base
        self.predict_at, self.halting_draw = predict_at, halting_draw
        self.image_index_B = torch.arange(images.shape[0], device=images.device)
        self.index = 0
        self.tokens_BSD = model.first_input(images, base)

    def keep(self, images: Tensor) -> None:
        """Continue with some of the images only: (B,) bool over the images of the last iteration."""
        self.images, self.base = self.images[images], self.base.select(images)
        self.image_index_B, self.tokens_BSD = self.image_index_B[images], self.tokens_BSD[images]

    def __next__(self) -> Iteration:
        model, index = self.model, self.index
        if index == model.config.iterations:
            raise StopIteration
        encoded_BSD = model.encoder(self.tokens_BSD)
        image_tokens_BND, latents_BLD = encoded_BSD.tensor_split([model.num_image_tokens], dim=1)
        bottleneck = model.read_out(latents_BLD)
        wanted = self.predict_at is None or index in self.predict_at
        halts = self._halts(index, wanted)
        prediction = (
            model.predict(bottleneck.codes_BLC, self.base.target_BN) if wanted or halts else None
        )
        halted = (
            model.halted(prediction, self.base, self.halting_draw)
            if halts and prediction is not None
            else None
        )
        iteration = Iteration(
            *(
                index,
                self.image_index_B,
                self.images,
                self.base,
                image_tokens_BND,
                latents_BLD,
                bottleneck,
            ),
            prediction=prediction if wanted else None,
            halted=halted,
        )
        self.index += 1
        if self.index < model.config.iterations:
            self.tokens_BSD = model.next_input(image_tokens_BND, latents_BLD, halted, self.index)
        return iteration

    def _halts(self, index: int, wanted: bool) -> bool:
        config = self.model.config
        if config.halting == "off":
            return False
        if index == config.iterations - 1 and not config.quirks.halt_after_last_iteration:
            return False
        return wanted or not (
            self.model.training and config.quirks.halt_only_at_predicted_iterations
        )
