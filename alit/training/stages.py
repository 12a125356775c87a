"""What the training loop needs of a stage, and the stages there are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from ..tokenizer import AdaptiveTokenizer
from .base import BaseStage
from .config import TrainingConfig
from .optimisation import MovingAverage, Optimiser
from .processes import Processes
from .stage1 import Stage1
from .stage2 import Stage2


class Stage(Protocol):
    """Modules and optimisers with their state, by name; the average of the model's weights; a step."""

    model: AdaptiveTokenizer
    modules: dict[str, nn.Module]
    optimisers: dict[str, Optimiser]
    average: MovingAverage

    def step(
        self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Step number ``step`` (from 0) on a batch in parts; the loss and its terms, on the device."""
        ...

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """What the model makes of the images (B, 3, height, width), in one or several ways."""
        ...

    def evaluating(self) -> AbstractContextManager[Any]:
        """Evaluation mode, for a look at the model within a run."""
        ...


def build_stage(model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> Stage:
    """The stage that ``config`` names, on the model's device."""
    stages: dict[str, type[BaseStage] | type[Stage1] | type[Stage2]] = {
        **{"base": BaseStage, "1": Stage1, "2": Stage2}
    }
    return stages[config.stage](model, config, own)
