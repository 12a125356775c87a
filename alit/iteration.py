"""What one iteration of the recurrence gives.

Shape suffixes: B images still in the batch, N class and image tokens, L latents so far, D width, C code channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        image_tokens_BND: class and image tokens as the encoder gave them, before halting; zero once dropped.
        latents_BLD: latent tokens as the encoder gave them.
        bottleneck: the latents read out.
        prediction: the decoder's output; None where nobody asked for it (``predict_at``).
        halted: (B, N - 1) bool, the image tokens masked, or dropped so far, after this iteration; None where nothing
            halts.
        places: of the images' grid, as ``model.predict`` takes them; None for the model's own.
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
    places: Places | None = None

    @property
    def num_tokens(self) -> int:
        """Latent tokens per image so far."""
        return self.latents_BLD.shape[1]

    @property
    def batch_size(self) -> int:
        return self.latents_BLD.shape[0]
