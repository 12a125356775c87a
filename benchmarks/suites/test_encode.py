"""Encoding into tokens with ``tiny``: as many as each picture needs, and every picture to one length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alit import FixedLength

from ..harness.contest import Contest, Work
from ..peers.baseline import eager_copy
from .models import GPU, LENGTHS, ROUNDS, WARMUP, model, pictures


def agreement(found: list[Tensor], expected: list[Tensor]) -> None:
    """A vector halfway between two codes may fall to either in a batch of another shape."""
    for indices, right in zip(found, expected, strict=True):
        share = float((indices == right).float().mean())
        assert share > 0.99, f"{1 - share:.1%} of the indices differ from those of a picture alone"


def encoding(quick: bool) -> Contest:
    """One length per picture: each leaves the batch when it has its tokens, or all run through every iteration."""
    ours = model(quick).eval()
    images = pictures(ours, len(LENGTHS))
    expected = [
        ours.encode(images[i : i + 1], FixedLength(n)).indices for i, n in enumerate(LENGTHS)
    ]
    step = ours.config.latents_per_iteration

    @torch.no_grad()
    def all_iterations() -> list[Tensor]:
        """The batch as it is through every iteration; each picture's tokens are those of its own one."""
        found: dict[int, Tensor] = {}
        for iteration in ours.rollout(images, predict_at=()):
            for i, length in enumerate(LENGTHS):
                if iteration.index == length // step - 1:
                    quantized = iteration.bottleneck.quantized
                    assert quantized is not None
                    found[i] = quantized.index[i]
        return [found[i] for i in range(len(LENGTHS))]

    def with_lengths() -> list[Tensor]:
        tokens = ours.encode(images, FixedLength(LENGTHS))
        return [tokens[i].indices for i in range(len(LENGTHS))]

    calls = {"ours": with_lengths, "every iteration for all": all_iterations}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        lambda found: agreement(found, expected),
        Work(),
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "every iteration for all"))
def test_encode_with_lengths(name: str, race: Callable, quick: bool) -> None:
    group = f"encode {len(LENGTHS)} pictures, 96 tokens on average"
    race(group, name, lambda: encoding(quick), ROUNDS, WARMUP)


def encoding_to(tokens: int, quick: bool) -> Contest:
    """Every picture to the same number of tokens."""
    ours = model(quick).eval()
    eager = eager_copy(ours)
    images = pictures(ours, 8 if GPU else 1)
    calls = {
        "eager baseline": lambda: [eager.encode(images, FixedLength(tokens)).indices],
        "ours": lambda: [ours.encode(images, FixedLength(tokens)).indices],
    }
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        agreement,
        Work(),
        against_first=True,
        notes={"images": len(images), "tokens": tokens},
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
@pytest.mark.parametrize("tokens", (32, 64, 128, 256) if GPU else (32, 256))
def test_encode_to(tokens: int, name: str, race: Callable, quick: bool) -> None:
    race(f"encode to {tokens} tokens", name, lambda: encoding_to(tokens, quick), ROUNDS, WARMUP)
