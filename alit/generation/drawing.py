"""Drawing: one token from each row of logits, with random numbers that depend on the sample, not on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_number


@dataclass(frozen=True)
class Sharpness:
    """Sampling options: how closely draws keep to likely tokens.

    Attributes:
        temperature: logits are divided by it; above 0, below 100.
        top_k: number of likeliest tokens to draw from; None: all.
        top_p: draw from the likeliest tokens with this total probability, above 0 and at most 1 (nucleus sampling,
            Holtzman et al., ICLR 2020, arXiv 1904.09751).

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, float, 1e-3, 100)
        if self.top_k is not None:
            check_number("top_k", self.top_k, int, 1, 2**31)
        if isinstance(self.top_p, bool) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")


def draw(logits_RK: Tensor, uniform_R: Tensor, sharpness: Sharpness) -> tuple[Tensor, Tensor]:
    """Draw a token from each row, by inversion of its cumulative distribution.

    Args:
        logits_RK: (R, K) of any floating dtype; -inf for what must not be drawn.
        uniform_R: (R,) float32 in [0, 1).

    Returns:
        token (R,) int64, and its probability (R,) float64 among those that may be drawn.
    """
    logits_RK, order_RK = logits_RK.double() / sharpness.temperature, None
    if sharpness.top_k is not None or sharpness.top_p < 1:
        count = logits_RK.shape[1]
        logits_RK, order_RK = logits_RK.topk(min(sharpness.top_k or count, count))
    p_RK = logits_RK.softmax(-1)
    if sharpness.top_p < 1:
        p_RK = p_RK.where(p_RK.cumsum(-1) - p_RK < sharpness.top_p, 0)
    below_RK = p_RK.cumsum(-1)
    total_R1 = below_RK[:, -1:]
    # float32 numbers below 1 times a float64 stay below it: a token without probability is never drawn.
    place_R1 = (below_RK <= uniform_R.double()[:, None] * total_R1).sum(-1, keepdim=True)
    probability_R = (p_RK.gather(1, place_R1) / total_R1)[:, 0]
    token_R1 = place_R1 if order_RK is None else order_RK.gather(1, place_R1)
    return token_R1[:, 0], probability_R


def chance(seed: int, number: int) -> torch.Generator:
    """Random generator of sample ``number`` of a seed, whichever samples are drawn beside it."""
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
