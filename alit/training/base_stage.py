"""Training of the base tokenizer alone: mean absolute pixel error and the base's own regularizer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ..base import BaseTokenizer
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .processes import Processes
from .stage import Stage


class BaseModule(nn.Module):
    """Base tokenizer and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, base: BaseTokenizer, regularizer: float) -> None:
        super().__init__()
        self.base, self.regularizer = base, regularizer

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar), and its terms by name, detached."""
        pixels, term = self.base.autoencode(images)
        error = l1_loss(pixels.float(), images.float())
        loss = error + self.regularizer * term.float()
        terms = {"loss": loss, "l1": error, "regularizer": term}
        return loss, {name: value.detach() for name, value in terms.items()}


class BaseStage(Stage):
    """Training stage in which only the base tokenizer learns.

    Raises:
        ValueError: a base tokenizer without weights, or one that is to be sharded.
    """

    model: AdaptiveTokenizer

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        if config.parallel == "fsdp":
            raise ValueError("parallel: expected ddp in stage base, got fsdp")
        model.eval().requires_grad_(False)
        base = model.base_tokenizer.train().requires_grad_(True)
        if not any(True for _ in base.parameters()):
            raise ValueError(f"base: a {model.config.base.kind} base tokenizer has no weights")
        super().__init__(model, config, own, BaseModule(base, config.regularizer), side="base")

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """Reconstructions of the images by the base tokenizer alone."""
        base, config = self.model.base_tokenizer, self.model.config
        return [base.pixels(base.encode(images).code_BNC.float(), config.grid)]
