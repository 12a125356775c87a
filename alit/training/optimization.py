"""AdamW whose whole state exists from the start, learning-rate schedule, moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .config import TrainingConfig
from .processes import whole

NamedParameters = list[tuple[str, Parameter]]


class Optimizer:
    """AdamW of named parameters, fused where the device has it.

    All state is made here, not at the first step: a parameter that gets its first gradient late (the mask token, later
    iterations) then counts its own steps, and a checkpoint always holds the same tensors.
    """

    def __init__(self, parameters: NamedParameters, config: TrainingConfig) -> None:
        self.parameters = parameters
        decayed = [p for name, p in parameters if _decays(name, p)]
        others = [p for name, p in parameters if not _decays(name, p)]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        devices = {p.device.type for _, p in parameters}
        fused = devices <= {"cuda", "cpu"}
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.peak_learning_rate,
            betas=config.betas,
            fused=fused,
        )
        for _, p in parameters:
            self.adamw.state[p] = {
                "step": torch.zeros((), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.clip = config.clip

    def step(self, learning_rate: float) -> Tensor:
        """Clip, step, drop the gradients; returns the gradient norm before clipping (a tensor: nothing waits)."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_([p for _, p in self.parameters], self.clip)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return whole(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Live state of the optimizer by name."""
        return {
            f"{name}/{key}": value
            for name, p in self.parameters
            for key, value in self.adamw.state[p].items()
        }


def _decays(name: str, parameter: Parameter) -> bool:
    """True for linear and convolution weights; not embeddings, tokens, norms, biases, or a codebook."""
    return name.endswith("weight") and parameter.ndim >= 2 and not name.endswith("embedding.weight")


class MovingAverage:
    """Exponential moving average of parameters: decay min(decay, (1 + n) / (10 + n)) at its n-th update."""

    def __init__(self, parameters: Iterable[tuple[str, Parameter]], decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for _, p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step ``step``, which counts from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for _, p in self.parameters], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Live averages by name."""
        return {name: value for (name, _), value in zip(self.parameters, self.values, strict=True)}


def schedule(done: float, warmup: float) -> float:
    """Factor of the learning rate after a fraction of the run: linear rise, then half a cosine to 0."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))
