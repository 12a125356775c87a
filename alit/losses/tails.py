"""Nested dropout (Rippel et al., 2014): the decoder learns to make the best of the first few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..iteration import Iteration
from ..model import AdaptiveModel


def check_tails(model: AdaptiveModel, tail_drop: float) -> None:
    """Check that a loss may drop tails of the latents of this model.

    Raises:
        ValueError: ``tail_drop`` is no probability; halting, which needs the prediction of all latents.
    """
    if not 0 <= tail_drop <= 1:
        raise ValueError(f"tail_drop: expected a probability, got {tail_drop}")
    if tail_drop and model.config.halting != "off":
        raise ValueError(
            f"tail_drop: halting {model.config.halting!r} needs the prediction of all tokens; expected 'off'"
        )


def kept_lengths(iteration: Iteration, own: int, tail_drop: float) -> Tensor:
    """Number of latents of each image that the decoder sees: (B,) int64, drawn from the device's default generator.

    With probability ``tail_drop`` the first n: in half of these cases n is uniform over the tokens that the iteration
    added, as encoding keeps them, else over all of them, as they are truncated later.

    Args:
        own: latents that an iteration adds.
    """
    total, device = iteration.num_tokens, iteration.latents_BLD.device
    drops, within, share = torch.rand(3, iteration.batch_size, device=device)
    before = torch.where(within < 0.5, total - own, 0)
    drawn = before + (share * (total - before)).long() + 1
    return torch.where(drops < tail_drop, drawn.clamp(max=total), total)
