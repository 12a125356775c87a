"""Stage 2, pixels: a step of the generator on L1, LPIPS and adversarial loss, then one of the discriminators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..base import BaseTokens
from ..losses import PatchDiscriminator, Perceptual, Weights, discriminator_loss, pixel_loss
from ..losses.stage2 import reconstructions
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .optimisation import MovingAverage, Optimiser
from .processes import Processes, distributed, synchronised
from .stage1 import (
    add_terms,
    at_four_lengths,
    check_shardable,
    compile_parts,
    evaluating,
    frozen_tokens,
    iterations_of,
    precision,
)

#: Below this side a PatchGAN has no patch.
SMALLEST = 24


@dataclass(frozen=True)
class Critics:
    """What judges pictures. No module: data-parallel wrappers of the model must not see it.

    Attributes:
        perceptual: LPIPS, one for all iterations.
        discriminators: one, or one per iteration; None where there is no adversarial loss.
    """

    perceptual: Perceptual | None
    discriminators: nn.ModuleList | None

    def discriminator(self, iteration: int) -> nn.Module:
        assert self.discriminators is not None
        return self.discriminators[min(iteration, len(self.discriminators) - 1)]


class GeneratorModule(nn.Module):
    """Model and loss as one module, as data-parallel wrappers want it."""

    def __init__(
        self, model: AdaptiveTokenizer, critics: Critics, weights: Weights, *, through_time: bool
    ) -> None:
        super().__init__()
        self.model, self.critics, self.weights = model, critics, weights
        self.through_time = through_time

    def forward(
        self, images: Tensor, base: BaseTokens | None, at: Sequence[int], gan_weight: float
    ) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
        """The loss, mean over iterations; its terms by name; detached reconstructions by iteration."""
        total = images.new_zeros(())
        terms: dict[str, Tensor] = {}
        pixels: dict[int, Tensor] = {}
        for index, decoded, quantization in reconstructions(
            self.model, images, at, base, through_time=self.through_time
        ):
            judge = self.critics.discriminator(index) if gan_weight > 0 else None
            loss = pixel_loss(
                *(self.model, images, decoded, quantization, judge, self.critics.perceptual),
                gan_weight=gan_weight,
                weights=self.weights,
            )
            total = total + loss.total / len(at)
            for name in self._terms(gan_weight):
                terms[f"{name}_{index}"] = getattr(loss, name).detach()
            pixels[index] = loss.reconstructions.detach()
        return total, {"loss": total.detach(), **terms}, pixels

    def _terms(self, gan_weight: float) -> list[str]:
        wanted = {
            "l1": True,
            "perceptual": self.critics.perceptual is not None,
            "l2": self.weights.l2 > 0,
            "ssim": self.weights.ssim > 0,
            "quantization": self.model.config.bottleneck == "quantized",
            "adversarial": gan_weight > 0,
            "weight": gan_weight > 0,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]


class DiscriminatorModule(nn.Module):
    """Discriminators and their loss as one module."""

    def __init__(self, critics: Critics) -> None:
        super().__init__()
        self.critics, self.discriminators = critics, critics.discriminators

    def forward(
        self, images: Tensor, pixels: dict[int, Tensor], gan_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, mean over iterations, and its terms by name."""
        total = images.new_zeros(())
        terms: dict[str, Tensor] = {}
        for index, decoded in pixels.items():
            judge = self.critics.discriminator(index)
            loss = discriminator_loss(images, decoded, judge, gan_weight=gan_weight)
            total = total + loss.total / len(pixels)
            named = {"discriminator": loss.total, "real": loss.real, "fake": loss.fake}
            terms |= {f"{name}_{index}": value.detach() for name, value in named.items()}
        return total, terms


class Stage2:
    """A step of both sides: the discriminators see the reconstructions that the generator was judged by.

    Raises:
        ValueError: LPIPS weights that cannot be had; pictures too small for a discriminator; what cannot be sharded.
    """

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        self.model, self.config = model, config
        self.autocast = precision(config.precision, own.device)
        model.train()
        model.base_tokenizer.eval()
        if not config.train_base:
            model.base_tokenizer.requires_grad_(False)
        if config.parallel == "fsdp":
            check_shardable(model)
        blocks = [*model.encoder.transformer, *model.decoder.transformer]
        if config.compile:
            compile_parts(model)
        weights = Weights(config.perceptual_weight, config.l2_weight, config.ssim_weight)
        self.critics = Critics(_perceptual(model, config, own), _discriminators(model, config, own))
        generator = GeneratorModule(model, self.critics, weights, through_time=config.through_time)
        self.module = distributed(generator, blocks, own, config.parallel)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.average = MovingAverage(trained, config.ema)
        self.optimisers = {"model": Optimiser(trained, config)}
        self.modules: dict[str, nn.Module] = {"model": model}
        if self.critics.discriminators is not None:
            judges = self.critics.discriminators
            shared = len(judges) == 1
            judging = DiscriminatorModule(self.critics)
            self.judges = distributed(judging, [], own, "ddp", all_used=shared)
            self.optimisers["discriminators"] = Optimiser(list(judges.named_parameters()), config)
            self.modules["discriminators"] = judges

    def step(
        self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One step of the generator and, once the GAN weight is above 0, one of the discriminators; the terms."""
        at = iterations_of(self.config, self.model.config.iterations, step, done)
        gan_weight = self.config.gan_weight(done)
        sums: dict[str, Tensor] = {}
        decoded: list[dict[int, Tensor]] = []
        for number, images in enumerate(parts, 1):
            with synchronised(self.module, last=number == len(parts)), self._fixed_critics():
                with self.autocast():
                    base = None if self.config.train_base else frozen_tokens(self.model, images)
                    loss, terms, pixels = self.module(images, base, at, gan_weight)
                (loss / len(parts)).backward()
            decoded.append(pixels)
            add_terms(sums, terms, len(parts))
        sums["gradient_norm"] = self.optimisers["model"].step(learning_rate)
        self.average.update(step + 1)
        if gan_weight > 0:
            self._judge(parts, decoded, gan_weight, sums)
            own_rate = self.config.discriminator_learning_rate
            scale = 1.0 if own_rate is None else own_rate / self.config.peak_learning_rate
            norm = self.optimisers["discriminators"].step(learning_rate * scale)
            sums["discriminator_gradient_norm"] = norm
        return sums

    def _judge(
        self,
        parts: Sequence[Tensor],
        decoded: Sequence[dict[int, Tensor]],
        gan_weight: float,
        sums: dict[str, Tensor],
    ) -> None:
        for number, (images, pixels) in enumerate(zip(parts, decoded, strict=True), 1):
            with synchronised(self.judges, last=number == len(parts)):
                with self.autocast():
                    loss, terms = self.judges(images, pixels, gan_weight)
                (loss / len(parts)).backward()
            add_terms(sums, terms, len(parts))

    @contextmanager
    def _fixed_critics(self) -> Iterator[None]:
        """Within, discriminators pass gradients on and get none."""
        if self.critics.discriminators is None:
            yield
            return
        self.critics.discriminators.requires_grad_(False)
        try:
            yield
        finally:
            self.critics.discriminators.requires_grad_(True)

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """The images at four lengths, from the shortest to the longest."""
        return at_four_lengths(self.model, images)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Evaluation mode and this run's precision, for a look at the model within a run."""
        return evaluating(self.model, self.autocast)


def _perceptual(
    model: AdaptiveTokenizer, config: TrainingConfig, own: Processes
) -> Perceptual | None:
    if config.perceptual == "off":
        return None
    quirks = model.config.quirks
    perceptual = Perceptual(
        unit_range=quirks.perceptual_unit_range, dropout=quirks.perceptual_dropout
    )
    try:
        if own.first:  # one process fetches, the others find the file
            perceptual.load_pretrained()
        own.barrier()
        if not own.first:
            perceptual.load_pretrained()
    except ValueError as error:
        raise ValueError(f"{error}; or train without it: --perceptual off") from error
    return perceptual.to(own.device).train()


def _discriminators(
    model: AdaptiveTokenizer, config: TrainingConfig, own: Processes
) -> nn.ModuleList | None:
    if not config.adversarial:
        return None
    if min(model.config.image_size) < SMALLEST:
        raise ValueError(
            f"image_size: expected at least {SMALLEST} pixels for a discriminator, got {model.config.image_size}"
        )
    count = model.config.iterations if config.discriminators == "each" else 1
    judges = nn.ModuleList(PatchDiscriminator() for _ in range(count))
    return judges.to(own.device).train()
