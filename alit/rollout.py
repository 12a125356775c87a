"""The recurrent rollout: an iterator over iterations, from which finished images can leave.

Shape suffixes: B images still in the batch, N class and image tokens, L latents so far, D width, C code channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alit_kernels import compact

from .base import BaseTokens, Prediction
from .iteration import Bottleneck, HaltingDraw, Iteration
from .layers import one_behind_another
from .model import AdaptiveModel
from .sizes import Grid, Places, check_image, check_images


class Rollout(Iterator[Iteration]):
    """Iterator over the iterations of the recurrent encoder on a batch, each an :class:`alit.Iteration`.

    Args:
        images: (B, 3, height, width) floating point in [0, 1], of the configured size.
        base: base tokens of the images, if they are known already.
        predict_at: iterations (from 0) that the caller wants the ``prediction`` of; all by default. The decoder runs
            for no other, unless halting needs it to.
        generator: source of randomness for posterior and halting; evaluation is deterministic without one.
        halting_draw: replaces the Bernoulli draw of halting.
        through_time: gradients flow back through the iterations, as published. False: they end where an iteration
            begins, and iterations outside ``predict_at`` record none (truncated backpropagation).
        predict_later: the caller makes these predictions, by ``model.predict_together``, and ``prediction`` is None.
            Only where halting is off: halting needs each at once.
        iterations: how many the caller takes; all by default. Nothing is made ready for a further one.
        places: positions of the images' grid, ``model.places(grid)``, if their size is not the configured one.

    Raises:
        TypeError, ValueError: images of the wrong dtype, shape, or (on the CPU) range; an iteration out of range.
    """

    def __init__(
        self,
        model: AdaptiveModel,
        images: Tensor,
        *,
        base: BaseTokens | None = None,
        predict_at: Collection[int] | None = None,
        generator: torch.Generator | None = None,
        halting_draw: HaltingDraw | None = None,
        through_time: bool = True,
        predict_later: bool = False,
        iterations: int | None = None,
        places: Places | None = None,
    ) -> None:
        self.places = model.places() if places is None else places
        check_images(model.config, model.latent_tokens, images, self.places.grid)
        config, quirks = model.config, model.config.quirks
        self.predict_at = range(config.iterations) if predict_at is None else predict_at
        for index in self.predict_at:
            if not 0 <= index < config.iterations:
                raise ValueError(
                    f"predict_at: expected iterations in 0..{config.iterations - 1}, got {index}"
                )
        self.iterations = config.iterations if iterations is None else iterations
        if not 1 <= self.iterations <= config.iterations:
            raise ValueError(f"iterations: expected 1 to {config.iterations}, got {iterations}")
        if predict_later and config.halting != "off":
            raise ValueError(
                f"predict_later: halting {config.halting!r} needs predictions at once; expected 'off'"
            )
        random = model.training or generator is not None
        if base is None:
            sample = random or quirks.random_posterior_in_evaluation
            base = model.base_tokenizer.encode(images, sample=sample, generator=generator)

        def draw(p: Tensor) -> Tensor:
            if random or quirks.random_halting_in_evaluation:
                return torch.bernoulli(p, generator=generator).bool()
            return torch.ones_like(p, dtype=torch.bool)

        self.model, self.images, self.base = model, images, base
        self.halting_draw = draw if halting_draw is None else halting_draw
        # No gradients flow through the residual: codes of earlier iterations are final.
        self.residual = config.recurrence == "residual"
        self.through_time = through_time and not self.residual
        self.predict_later = predict_later
        self.earlier: Bottleneck | None = None
        self.predicted: Prediction | None = None
        self.image_index_B = torch.arange(images.shape[0], device=images.device)
        self.index = 0
        self._ahead: tuple[Bottleneck, Prediction | None] | None = None
        with self._recording():
            self.tokens_BSD = model.first_input(images, base, self.places)
        #: (B, N - 1) image tokens that have left the sequence (halting="drop"), or None.
        self.dropped: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.tokens_BSD.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows of the encoder's next run, dropped ones included."""
        return self.tokens_BSD.shape[0] * self.tokens_BSD.shape[1]

    def keep(self, images: Tensor) -> None:
        """Continue with some of the images only: (B,) bool over the images of the last iteration."""
        self.images, self.base = self.images[images], self.base.select(images)
        self.image_index_B, self.tokens_BSD = self.image_index_B[images], self.tokens_BSD[images]
        if self.dropped is not None:
            self.dropped = self.dropped[images]
        if self.earlier is not None:
            self.earlier = self.earlier.select(images)

    def rows_kept(self) -> Tensor:
        """Mask of the rows that the encoder sees, (B, S) bool."""
        keep = self.tokens_BSD.new_ones(self.tokens_BSD.shape[:2], dtype=torch.bool)
        if self.dropped is not None:
            keep[:, 1 : 1 + self.dropped.shape[1]] = ~self.dropped
        return keep

    def __next__(self) -> Iteration:
        if self.index >= self.iterations:
            raise StopIteration
        with self._recording():
            (encoded_BSD,) = encode_together([self])
        return self.advance(encoded_BSD)

    def _recording(self) -> torch.set_grad_enabled:
        """Context manager: the caller's gradient mode; off outside ``predict_at`` if not ``through_time``."""
        learns = self.through_time or self.index in self.predict_at
        return torch.set_grad_enabled(torch.is_grad_enabled() and learns)

    def advance(self, encoded_BSD: Tensor) -> Iteration:
        """Take the encoder's output (see :func:`encode_together`), make the next input and return the iteration."""
        with self._recording():
            iteration = self._observe(encoded_BSD)
        self.index += 1
        if self.index < self.iterations:
            with self._recording():
                self._prepare(iteration)
        return iteration

    def _needs(self) -> tuple[bool, bool, bool]:
        """Three reasons for this iteration's prediction, true or false: the caller wants it; tokens halt after the
        iteration; the next iteration begins with it.
        """
        model, quirks = self.model, self.model.config.quirks
        wanted = self.index in self.predict_at and not self.predict_later
        last = self.index == model.config.iterations - 1
        halts = model.config.halting != "off" and (not last or quirks.halt_after_last_iteration)
        if model.training and quirks.halt_only_at_predicted_iterations:
            halts = halts and wanted
        return wanted, halts, self.residual and self.index + 1 < self.iterations

    def _observe(self, encoded_BSD: Tensor) -> Iteration:
        model, config, (wanted, halts, feeds) = self.model, self.model.config, self._needs()
        image_tokens_BND, latents_BLD = encoded_BSD.tensor_split([self.places.tokens], dim=1)
        if self._ahead is None:
            bottleneck, prediction = model.read_out(latents_BLD, self.earlier), None
            if wanted or halts or feeds:
                # A prediction that only the next iteration needs passes no gradient on.
                with torch.set_grad_enabled(torch.is_grad_enabled() and (wanted or halts)):
                    codes_BLC, target_BN = bottleneck.codes_BLC, self.base.target_BN
                    prediction = model.predict(codes_BLC, target_BN, places=self.places)
        else:
            (bottleneck, prediction), self._ahead = self._ahead, None
        self.predicted = prediction if feeds else None
        halted = None
        if halts:
            assert prediction is not None
            halted = model.halted(prediction, self.base, self.halting_draw)
        if config.halting == "drop" and halted is not None:
            # Dropped tokens do not come back.
            self.dropped = halted = halted if self.dropped is None else halted | self.dropped
        return Iteration(
            *(self.index, self.image_index_B, self.images, self.base),
            *(image_tokens_BND, latents_BLD, bottleneck),
            prediction=prediction if wanted else None,
            halted=halted,
            places=self.places,
            decoded=self.predicted,
        )

    def _prepare(self, iteration: Iteration) -> None:
        """Make the encoder's next input from an iteration."""
        image_tokens_BND, latents_BLD = iteration.image_tokens_BND, iteration.latents_BLD
        if self.residual:
            assert self.predicted is not None
            self.earlier = iteration.bottleneck
            latents_BLD = latents_BLD[:, :0]
            image_tokens_BND = self.model.missing_tokens(
                self.images, self.base, self.predicted, self.places
            )
        if not self.through_time:
            image_tokens_BND, latents_BLD = image_tokens_BND.detach(), latents_BLD.detach()
        halted = None if self.model.config.halting == "drop" else iteration.halted
        self.tokens_BSD = self.model.next_input(
            image_tokens_BND, latents_BLD, halted, self.index, self.places
        )


def encode_together(rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Run the encoder once for all images of some rollouts of one model, whatever their iterations: (B, S, D) for each.

    Sequences of one length make a dense batch; others, and those from which tokens were dropped, are packed, so that
    padding and dropped tokens cost nothing. Rows of dropped tokens are zero. Where tokens were dropped, the host
    asks the device once how many are left. For several rollouts the decoder runs once too, for all that need it.
    """
    encoded = _encoded(rollouts)
    if len(rollouts) > 1:
        _predict_together(rollouts, encoded)
    return encoded


def _encoded(rollouts: Sequence[Rollout]) -> list[Tensor]:
    encoder, inputs = rollouts[0].model.encoder, [rollout.tokens_BSD for rollout in rollouts]
    dropped = any(rollout.dropped is not None for rollout in rollouts)
    sizes = [x.shape[0] for x in inputs]
    if not dropped and len({x.shape[1] for x in inputs}) == 1:
        return list(encoder(inputs[0] if len(inputs) == 1 else torch.cat(inputs)).split(sizes))
    rows_TD, offsets, longest = one_behind_another(inputs)
    if dropped:
        keep = torch.cat([rollout.rows_kept().flatten() for rollout in rollouts])
        packed, offsets, source = compact(rows_TD, offsets, keep, capacity=int(keep.sum()))
        packed = encoder(packed, offsets, max_length=longest)
        rows_TD = packed.new_zeros(rows_TD.shape).index_copy(0, source.long(), packed)
    else:
        rows_TD = encoder(rows_TD, offsets, max_length=longest)
    pieces = rows_TD.split([rollout.rows for rollout in rollouts])
    return [piece.view(x.shape) for piece, x in zip(pieces, inputs, strict=True)]


def _predict_together(rollouts: Sequence[Rollout], encoded: Sequence[Tensor]) -> None:
    """Read out the latents of each rollout, and make the predictions that are needed, in one run of the decoder."""
    model = rollouts[0].model
    ahead = [
        model.read_out(x[:, r.places.tokens :], r.earlier)
        for r, x in zip(rollouts, encoded, strict=True)
    ]
    needed = [i for i, r in enumerate(rollouts) if any(r._needs())]
    found = model.predict_each(
        [ahead[i].codes_BLC for i in needed],
        [rollouts[i].places for i in needed],
        targets=[rollouts[i].base.target_BN for i in needed],
        lengths=[None] * len(needed),
    )
    predictions = dict(zip(needed, found, strict=True))
    for i, rollout in enumerate(rollouts):
        rollout._ahead = ahead[i], predictions.get(i)


def rollouts_of(
    model: AdaptiveModel,
    images: Sequence[Tensor],
    *,
    first: int = 0,
    known: dict[Grid, Places] | None = None,
    **options: Any,
) -> list[tuple[Rollout, list[int]]]:
    """Rollouts of images (3, height, width) of any sizes, for :func:`encode_together`: one for each size, with the
    numbers of its images.

    Args:
        first: number of the first image; ``image_index_B`` and messages count from it.
        known: positions by grid, to which those of new grids are added.
        options: as for :class:`Rollout`.

    Raises:
        TypeError, ValueError: an image of the wrong dtype, shape or range, by its number (``images[3]: ...``).
    """
    known = {} if known is None else known
    by_grid: dict[Grid, list[int]] = {}
    for number, image in enumerate(images):
        grid = check_image(model.config, model.latent_tokens, image, f"images[{first + number}]")
        by_grid.setdefault(grid, []).append(number)
    rollouts = []
    for grid, numbers in by_grid.items():
        if grid not in known:
            known[grid] = model.places(grid)
        batch = torch.stack([images[number] for number in numbers])
        rollout = Rollout(model, batch, places=known[grid], **options)
        numbers = [first + number for number in numbers]
        rollout.image_index_B = torch.tensor(numbers, device=batch.device)
        rollouts.append((rollout, numbers))
    return rollouts
