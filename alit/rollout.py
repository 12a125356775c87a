"""The recurrent rollout: an iterator over iterations, from which finished images can leave.

Shape suffixes: B images still in the batch, N class and image tokens, L latents so far, D width, C code channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alit_kernels import VectorQuantized, compact, cumulative_offsets

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
        image_tokens_BND: class and image tokens as the encoder gave them, before halting; zero once dropped.
        latents_BLD: latent tokens as the encoder gave them.
        bottleneck: the latents read out.
        prediction: the decoder's output, where it was asked for.
        halted: (B, N - 1) bool, the image tokens masked, or dropped so far, after this iteration; None where nothing
            halts.
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
        through_time: bool = True,
        predict_later: bool = False,
    ) -> None:
        self.model, self.images, self.base = model, images, base
        self.predict_at, self.halting_draw = predict_at, halting_draw
        self.through_time, self.predict_later = through_time, predict_later
        self.image_index_B = torch.arange(images.shape[0], device=images.device)
        self.index = 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns(0)):
            self.tokens_BSD = model.first_input(images, base)
        #: (B, N - 1) image tokens that have left the sequence (halting="drop"), or None.
        self.dropped: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.tokens_BSD.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the encoder's next run, dropped ones included."""
        return self.tokens_BSD.shape[0] * self.tokens_BSD.shape[1]

    def keep(self, images: Tensor) -> None:
        """Continue with some of the images only: (B,) bool over the images of the last iteration."""
        self.images, self.base = self.images[images], self.base.select(images)
        self.image_index_B, self.tokens_BSD = self.image_index_B[images], self.tokens_BSD[images]
        if self.dropped is not None:
            self.dropped = self.dropped[images]

    def __next__(self) -> Iteration:
        if self.index == self.model.config.iterations:
            raise StopIteration
        recording = torch.is_grad_enabled()
        with torch.set_grad_enabled(recording and self._learns(self.index)):
            iteration = self._observe(*encode_together([self]))
        with torch.set_grad_enabled(recording and self._learns(self.index)):
            self._prepare(iteration)
        return iteration

    def _learns(self, index: int) -> bool:
        return self.through_time or self.predict_at is None or index in self.predict_at

    def advance(self, encoded_BSD: Tensor) -> Iteration:
        """Take the encoder's output (see :func:`encode_together`) and make the input of the next iteration."""
        iteration = self._observe(encoded_BSD)
        self._prepare(iteration)
        return iteration

    def _observe(self, encoded_BSD: Tensor) -> Iteration:
        model, index = self.model, self.index
        image_tokens_BND, latents_BLD = encoded_BSD.tensor_split([model.num_image_tokens], dim=1)
        bottleneck = model.read_out(latents_BLD)
        wanted = not self.predict_later and (self.predict_at is None or index in self.predict_at)
        halts = self._halts(index, wanted)
        prediction = (
            model.predict(bottleneck.codes_BLC, self.base.target_BN) if wanted or halts else None
        )
        halted = (
            model.halted(prediction, self.base, self.halting_draw)
            if halts and prediction is not None
            else None
        )
        if model.config.halting == "drop" and halted is not None:
            # What has left does not come back.
            self.dropped = halted = halted if self.dropped is None else halted | self.dropped
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
        return iteration

    def _prepare(self, iteration: Iteration) -> None:
        """The encoder's next input."""
        config = self.model.config
        if self.index == config.iterations:
            return
        image_tokens_BND, latents_BLD = iteration.image_tokens_BND, iteration.latents_BLD
        if not self.through_time:
            image_tokens_BND, latents_BLD = image_tokens_BND.detach(), latents_BLD.detach()
        halted = None if config.halting == "drop" else iteration.halted
        self.tokens_BSD = self.model.next_input(image_tokens_BND, latents_BLD, halted, self.index)

    def _halts(self, index: int, wanted: bool) -> bool:
        config = self.model.config
        if config.halting == "off":
            return False
        if index == config.iterations - 1 and not config.quirks.halt_after_last_iteration:
            return False
        return wanted or not (
            self.model.training and config.quirks.halt_only_at_predicted_iterations
        )


def encode_together(rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Run the encoder once for all images of some rollouts of one model, whatever their iterations: (B, S, D) for each.

    Sequences of one length make a dense batch; others, and those from which tokens were dropped, are packed, so that
    padding and dropped tokens cost nothing. Rows of dropped tokens are zero. Where tokens were dropped, the host
    asks the device once how many are left.
    """
    encoder, inputs = rollouts[0].model.encoder, [rollout.tokens_BSD for rollout in rollouts]
    dropped = any(rollout.dropped is not None for rollout in rollouts)
    sizes = [x.shape[0] for x in inputs]
    if not dropped and len({x.shape[1] for x in inputs}) == 1:
        return list(encoder(inputs[0] if len(inputs) == 1 else torch.cat(inputs)).split(sizes))
    rows_TD = torch.cat([x.flatten(0, 1) for x in inputs])
    lengths = torch.cat([x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64) for x in inputs])
    offsets, longest = cumulative_offsets(lengths), max(x.shape[1] for x in inputs)
    if dropped:
        keep = torch.cat([_kept(rollout).flatten() for rollout in rollouts])
        packed, offsets, source = compact(rows_TD, offsets, keep, capacity=int(keep.sum()))
        packed = encoder(packed, offsets, max_length=longest)
        rows_TD = packed.new_zeros(rows_TD.shape).index_copy(0, source.long(), packed)
    else:
        rows_TD = encoder(rows_TD, offsets, max_length=longest)
    pieces = rows_TD.split([rollout.rows for rollout in rollouts])
    return [piece.view(x.shape) for piece, x in zip(pieces, inputs, strict=True)]


def _kept(rollout: Rollout) -> Tensor:
    """(B, S) bool: the rows that the encoder sees."""
    keep = rollout.tokens_BSD.new_ones(rollout.tokens_BSD.shape[:2], dtype=torch.bool)
    if rollout.dropped is not None:
        keep[:, 1 : 1 + rollout.dropped.shape[1]] = ~rollout.dropped
    return keep
