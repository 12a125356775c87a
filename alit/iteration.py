"""Results of one iteration of the recurrence.

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

#: Draw of the tokens that halt: their probabilities of halting (B, N - 1) to bool of the same shape.
HaltingDraw = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """Latents read out for the decoder.

    Attributes:
        codes_BLC: input of the decoder: quantized, continuous, or (unfactorized) of the encoder's width.
        continuous_BLC: the same before normalization and quantization.
        quantized: quantizer's result for the latents of this iteration: all, or with ``recurrence="residual"`` the
            fresh ones. None without a quantizer.
        index_BL: int64, codebook indices of all latents; None without a quantizer.
    """

    codes_BLC: Tensor
    continuous_BLC: Tensor
    quantized: VectorQuantized | None = None
    index_BL: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Loss of the quantizer; None without one."""
        return None if self.quantized is None else self.quantized.loss

    def select(self, images: Tensor) -> Bottleneck:
        """Bottleneck of some images (a bool mask or an index over B), without the losses, which are of all."""
        index_BL = None if self.index_BL is None else self.index_BL[images]
        codes_BLC, continuous_BLC = self.codes_BLC[images], self.continuous_BLC[images]
        return Bottleneck(codes_BLC, continuous_BLC, None, index_BL)


@dataclass(frozen=True, eq=False)
class Iteration:
    """State after one iteration.

    Attributes:
        index: 0 for the first.
        image_index_B: numbers of these images among those given to ``rollout``.
        images: (B, 3, height, width).
        base: their base tokens.
        image_tokens_BND: class and image tokens as the encoder gave them, before halting; zero once dropped.
        latents_BLD: latent tokens as the encoder gave them: all, or with ``recurrence="residual"`` the fresh ones.
        bottleneck: the latents read out.
        prediction: the decoder's output; None where nobody asked for it (``predict_at``).
        halted: (B, N - 1) bool, the image tokens masked, or dropped so far, after this iteration; None where nothing
            halts.
        lengths_B: (B,) int64, number of latents that count for each image, if only the first of them are looked at;
            None: all.
        places: positions of the images' grid, as ``model.predict`` takes them; None for the model's own.
        decoded: decoder's output if the next iteration begins with it (recurrence "residual"), whether or not anybody
            asked for a prediction; else None.
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
        """Number of latent tokens that count for each image, (B,) int64."""
        if self.lengths_B is not None:
            return self.lengths_B
        return torch.full_like(self.image_index_B, self.num_tokens)

    def select(self, images: Tensor) -> Iteration:
        """Iteration of some images (an index over B), without prediction and halting."""
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
        """Number of latent tokens per image so far."""
        return self.bottleneck.codes_BLC.shape[1]

    @property
    def batch_size(self) -> int:
        return self.latents_BLD.shape[0]
