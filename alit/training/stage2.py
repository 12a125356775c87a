"""Stage 2, pixels: a step of the generator on L1, LPIPS and adversarial loss, then one of the discriminators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ..losses import (
    FeatureDistance,
    PatchDiscriminator,
    Perceptual,
    Weights,
    discriminator_loss,
    pixel_loss,
)
from ..losses.stage2 import reconstructions
from ..losses.tails import check_tails
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import Terms
from .fields import expect
from .optimization import Optimizer
from .processes import Processes, distributed
from .stage import AdaptiveStage, accumulated, frozen_tokens, iterations_of

#: Below this side a PatchGAN has no patch.
SMALLEST = 24


@dataclass(frozen=True)
class Critics:
    """Networks that judge images. It is no module: data-parallel wrappers of the model must not see it.

    Attributes:
        perceptual: LPIPS or :class:`alit.losses.FeatureDistance`, one for all iterations.
        discriminators: one, or one per iteration; none where there is no adversarial loss.
    """

    perceptual: nn.Module | None
    discriminators: nn.ModuleList

    def discriminator(self, iteration: int) -> nn.Module:
        return self.discriminators[min(iteration, len(self.discriminators) - 1)]


class GeneratorModule(nn.Module):
    """Model and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, model: AdaptiveTokenizer, critics: Critics, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.critics, self.config = model, critics, config
        self.weights = Weights(config.perceptual_weight, config.l2_weight, config.ssim_weight)

    def forward(
        self, images: Tensor, at: Sequence[int], gan_weight: float
    ) -> tuple[Tensor, Terms, dict[int, Tensor]]:
        """Loss, mean over iterations; its terms by name; detached reconstructions by iteration."""
        base = None if self.config.train_base else frozen_tokens(self.model, images)
        total = images.new_zeros(())
        terms: Terms = {}
        pixels: dict[int, Tensor] = {}
        for index, decoded, quantization, code in reconstructions(
            *(self.model, images, at, base),
            through_time=self.config.through_time,
            tail_drop=self.config.tail_drop,
        ):
            judge = self.critics.discriminator(index) if gan_weight > 0 else None
            loss, found = pixel_loss(
                *(self.model, images, decoded, quantization, judge, self.critics.perceptual),
                gan_weight=gan_weight,
                weights=self.weights,
            )
            if self.config.code_weight:
                loss, found["code"] = loss + self.config.code_weight * code, code
            total = total + loss / len(at)
            terms |= {f"{name}_{index}": value.detach() for name, value in found.items()}
            pixels[index] = decoded.detach()
        if self.config.base_weight:
            own, term = self.model.base_tokenizer.autoencode(images)
            terms["base_l1"] = l1_loss(own.float(), images.float())
            total = total + self.config.base_weight * (
                terms["base_l1"] + self.config.regularizer * term.float()
            )
            terms["base_l1"] = terms["base_l1"].detach()
        return total, {"loss": total.detach(), **terms}, pixels


class DiscriminatorModule(nn.Module):
    """Discriminators and their loss as one module."""

    def __init__(self, critics: Critics) -> None:
        super().__init__()
        self.critics, self.discriminators = critics, critics.discriminators

    def forward(self, images: Tensor, pixels: dict[int, Tensor]) -> tuple[Tensor, Terms]:
        """Loss, mean over iterations, and its terms by name."""
        total = images.new_zeros(())
        terms: Terms = {}
        for index, decoded in pixels.items():
            loss, found = discriminator_loss(images, decoded, self.critics.discriminator(index))
            total = total + loss / len(pixels)
            found = {"discriminator": loss, **found}
            terms |= {f"{name}_{index}": value.detach() for name, value in found.items()}
        return total, terms


class Stage2(AdaptiveStage):
    """Training stage 2: steps of generator and discriminators, which see the reconstructions that they have judged.

    Raises:
        ValueError: weights of a perceptual loss that cannot be had; images too small for a discriminator; what cannot
            be sharded; ``tail_drop``, and tokens that halt; ``base_weight`` without a base that learns.
    """

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        check_tails(model, config.tail_drop)
        model.train(config.train_decoder)  # codebooks learn in training mode
        model.base_tokenizer.eval()
        if not config.train_decoder:
            _freeze_all_but_filter(model)
        if not config.train_base:
            model.base_tokenizer.requires_grad_(False)
        learns = any(p.requires_grad for p in model.base_tokenizer.parameters())
        expect(
            "base_weight",
            learns or not config.base_weight,
            "0 where no base learns",
            config.base_weight,
        )
        self.critics = Critics(_perceptual(model, config, own), _discriminators(model, config, own))
        super().__init__(model, config, own, GeneratorModule(model, self.critics, config))
        self.decoded: list[dict[int, Tensor]] = []
        if judges := self.critics.discriminators:
            judging = DiscriminatorModule(self.critics)
            self.judges = distributed(judging, [], own, "ddp", all_used=len(judges) == 1)
            self.optimizers["discriminators"] = Optimizer(list(judges.named_parameters()), config)
            self.modules["discriminators"] = judges

    def step(self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]) -> Terms:
        """Run a generator step and, once the GAN weight is above 0, a discriminator step; returns the terms."""
        self.decoded.clear()
        sums = super().step(step, done, learning_rate, parts)
        if self.config.gan_weight(done) > 0:
            sums |= accumulated(
                self.judges,
                list(zip(parts, self.decoded, strict=True)),
                lambda seen: self.gradients(self.judges, len(parts), *seen)[0],
            )
            own_rate = self.config.discriminator_learning_rate
            scale = 1.0 if own_rate is None else own_rate / self.config.peak_learning_rate
            norm = self.optimizers["discriminators"].step(learning_rate * scale)
            sums["discriminator_gradient_norm"] = norm
        return sums

    def computation(
        self, step: int, done: float, parts: Sequence[Tensor]
    ) -> Callable[[Tensor], Terms]:
        at = iterations_of(self.config, self.model.config.iterations, step, done)
        gan_weight = self.config.gan_weight(done)

        def compute(images: Tensor) -> Terms:
            # Discriminators pass gradients on and get none.
            self.critics.discriminators.requires_grad_(False)
            try:
                terms, pixels = self.gradients(self.module, len(parts), images, at, gan_weight)
            finally:
                self.critics.discriminators.requires_grad_(True)
            self.decoded.append(pixels)
            return terms

        return compute


def _freeze_all_but_filter(model: AdaptiveTokenizer) -> None:
    if model.pixel_filter is None:
        raise ValueError(
            "train_decoder: expected true, for this model has no pixel filter; start from one with pixel_filter"
        )
    model.requires_grad_(False)
    model.pixel_filter.requires_grad_(True)


def _perceptual(
    model: AdaptiveTokenizer, config: TrainingConfig, own: Processes
) -> nn.Module | None:
    if config.perceptual == "off":
        return None
    if config.perceptual == "efficientnet":
        return FeatureDistance().to(own.device)
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
) -> nn.ModuleList:
    if not config.adversarial:
        return nn.ModuleList()
    if min(model.config.image_size) < SMALLEST:
        raise ValueError(
            f"image_size: expected at least {SMALLEST} pixels for a discriminator, got {model.config.image_size}"
        )
    count = model.config.iterations if config.discriminators == "each" else 1
    judges = nn.ModuleList(PatchDiscriminator() for _ in range(count))
    return judges.to(own.device).train()
