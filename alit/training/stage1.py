"""The plain stage-1 loop: pictures in memory, one device, sampled iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ..losses import stage1_loss
from ..tokenizer import AdaptiveTokenizer


@dataclass(frozen=True)
class Stage1Options:
    """Options of :func:`train_stage1`; optimiser settings as published where they do not depend on scale.

    Attributes:
        seconds: length of the run; the learning rate follows the elapsed fraction (linear warm-up, then cosine to 0).
        max_steps: end of the run in steps, if that comes first.
        warmup: fraction of the run.
        first_only: fraction of the run, below 0.75, in which only the first iteration counts; then one
            iteration a step, drawn from a range that grows to all of them until three quarters of the
            run: a latent has to carry something before the recurrence can refine it.
        flip: mirror half of the pictures.
    """

    seconds: float = 90.0
    max_steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 3.0
    warmup: float = 0.03
    first_only: float = 0.25
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")
        if not 0 <= self.first_only < 0.75:
            raise ValueError(f"first_only: expected a fraction below 0.75, got {self.first_only}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")


def train_stage1(
    model: AdaptiveTokenizer,
    images: Tensor,
    options: Stage1Options | None = None,
    *,
    on_step: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """Train encoder, bottleneck and decoder on pictures; the base tokenizer stays as it is.

    Args:
        images: (N, 3, height, width) in [0, 1]; each step draws a batch without replacement.
        on_step: called with step, elapsed fraction of the run, and mean code error (mse) of the step.

    Returns:
        The mean code error (mse over base-token channels) of each step.

    Raises:
        ValueError: wrong images, fewer than a batch; a loss that is not finite.
    """
    options = options or Stage1Options()
    if len(images) < options.batch_size:
        raise ValueError(
            f"images: expected at least a batch of {options.batch_size}, got {len(images)}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    with _training(model) as parameters:
        return _run(model, images, options, parameters, generator, on_step)


@contextmanager
def _training(model: AdaptiveTokenizer) -> Iterator[list[Parameter]]:
    """Training mode with the base tokenizer frozen; evaluation mode and the old flags afterwards."""
    frozen = [p for p in model.base_tokenizer.parameters() if p.requires_grad]
    model.train()
    model.base_tokenizer.eval().requires_grad_(False)
    try:
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _run(
    model: AdaptiveTokenizer,
    images: Tensor,
    options: Stage1Options,
    parameters: list[Parameter],
    generator: torch.Generator,
    on_step: Callable[[int, float, float], None] | None,
) -> list[float]:
    optimiser = torch.optim.AdamW(
        parameters, betas=options.betas, weight_decay=options.weight_decay
    )
    errors: list[float] = []
    start = time.monotonic()

    def elapsed() -> float:
        """Fraction of the run, by time or by steps, whichever is further."""
        by_steps = len(errors) / options.max_steps if options.max_steps else 0.0
        return max((time.monotonic() - start) / options.seconds, by_steps)

    while (done := elapsed()) < 1:
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * _schedule(done, options.warmup)
        batch = images[torch.randperm(len(images), generator=generator)[: options.batch_size]]
        if options.flip:
            mirrored = (torch.rand(options.batch_size, generator=generator) < 0.5).to(batch.device)
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
        at = _sampled_iterations(done, options.first_only, model.config.iterations, generator)
        loss = stage1_loss(model, batch, at=at)
        value = loss.total.item()
        if not math.isfinite(value):
            raise ValueError(f"loss: expected a finite value, got {value} at step {len(errors)}")
        optimiser.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        optimiser.step()
        errors.append(sum(term.code.item() for term in loss.iterations.values()) / len(at))
        if on_step is not None:
            on_step(len(errors), elapsed(), errors[-1])
    return errors


def _sampled_iterations(
    done: float, first_only: float, iterations: int, generator: torch.Generator
) -> list[int]:
    growth = min(1.0, max(0.0, done - first_only) / (0.75 - first_only))
    return [int(torch.randint(0, round(growth * (iterations - 1)) + 1, (1,), generator=generator))]


def _schedule(done: float, warmup: float) -> float:
    if done < warmup:
        return max(done / warmup, 0.05)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
