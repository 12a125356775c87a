"""What one iteration of the recurrence gives.

Shape suffixes: B images still in the batch, N class and image tokens, L latents so far, D width, C code channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alit_kernels import VectorQuantized

from .base import BaseTokens, Prediction
from .sizes import Places

#: Which tokens halt, given each one's probability of halting (B, N - 1): bool of the same shape.
HaltingDraw = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """Latents read out for the decoder.

    Attributes:
        codes_BLC: what the decoder gets: quantized, continuous, or (unfactorized) of the encoder's width.
        continuous_BLC: the same before normalization and quantization.
        quantized: of the latents that this iteration quantized: all, or with ``recurrence="residual"`` the fresh ones.
            None where there is no quantizer.
        index_BL: int64, of all; None likewise.
    """

    codes_BLC: Tensor
    continuous_BLC: Tensor
    quantized: VectorQuantized | None = None
    index_BL: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """The quantizer's."""
        return None if self.quantized is None else self.quantized.loss

    def select(self, images: Tensor) -> Bottleneck:
        """Of some images (a bool mask or an index over B), without the losses of all."""
        index_BL = None if self.index_BL is None else self.index_BL[images]
        codes_BLC, continuous_BLC = self.codes_BLC[images], self.continuous_BLC[images]
        return Bottleneck(codes_BLC, continuous_BLC, None, index_BL)


@dataclass(frozen=True, eq=False)
class Iteration:
    """State after one iteration.

    Attributes:
        index: 0 for the first.
        image_index_B: which of the images given to ``rollout`` these are.
        images: (B, 3, height, width).
        base: their base tokens.
        image_tokens_BND: class and image tokens as the encoder gave them, before halting; zero once dropped.
        latents_BLD: latent tokens as the encoder gave them: all, or with ``recurrence="residual"`` the fresh ones.
        bottleneck: the latents read out.
        prediction: the decoder's output; None where nobody asked for it (``predict_at``).
        halted: (B, N - 1) bool, the image tokens masked, or dropped so far, after this iteration; None where nothing
            halts.
        lengths_B: (B,) int64, how many of the latents count for each image, where only the first of them are looked at;
            None: all.
        places: of the images' grid, as ``model.predict`` takes them; None for the model's own.
        decoded: what the decoder makes of the tokens where the next iteration is made of it (recurrence "residual"),
            whether or not anybody asked for a prediction; None elsewhere.
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
    lengths_B: Tensor | None = None
    places: Places | None = None
    decoded: Prediction | None = None

    @property
    def tokens_B(self) -> Tensor:
        """(B,) int64: latent tokens that count."""
        if self.lengths_B is not None:
            return self.lengths_B
        return torch.full_like(self.image_index_B, self.num_tokens)

    def select(self, images: Tensor) -> Iteration:
        """The same of some images (an index over B), without prediction and halting."""
        return replace(
            self,
            image_index_B=self.image_index_B[images],
            images=self.images[images],
            base=self.base.select(images),
            image_tokens_BND=self.image_tokens_BND[images],
            latents_BLD=self.latents_BLD[images],
            bottleneck=self.bottleneck.select(images),
            prediction=None,
            decoded=None,
            halted=None,
            lengths_B=None if self.lengths_B is None else self.lengths_B[images],
        )

    @property
    def num_tokens(self) -> int:
        """Latent tokens per image so far."""
        return self.bottleneck.codes_BLC.shape[1]

    @property
    def batch_size(self) -> int:
        return self.latents_BLD.shape[0]
