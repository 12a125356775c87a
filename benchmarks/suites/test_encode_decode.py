"""Encoding with ``tiny`` to a length for each image or one length for all, and decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit import FixedLength

from ..harness.contest import Contest, Work, ready
from ..peers.baseline import eager_copy
from .models import GPU, LENGTHS, ROUNDS, WARMUP, model, random_images


def agreement(found: list[Tensor], expected: list[Tensor]) -> None:
    """Check that over 99 % of the indices agree: vectors halfway between two codes may differ by batch shape."""
    for indices, right in zip(found, expected, strict=True):
        share = float((indices == right).float().mean())
        assert share > 0.99, f"{1 - share:.1%} of the indices differ from those of an image alone"


def encoding(quick: bool) -> Contest:
    """Contest of encoding to one length per image: finished images leave the batch, or all run every iteration."""
    ours = model(quick).eval()
    images = random_images(ours, len(LENGTHS))
    expected = [
        ours.encode(images[i : i + 1], FixedLength(n)).indices for i, n in enumerate(LENGTHS)
    ]

    @torch.no_grad()
    def all_iterations() -> list[Tensor]:
        """Indices of each image at its own length, from a rollout of the whole batch through every iteration."""
        found: dict[int, Tensor] = {}
        for iteration in ours.rollout(images, predict_at=()):
            for i, length in enumerate(LENGTHS):
                if iteration.num_tokens == length:
                    assert iteration.bottleneck.quantized is not None
                    found[i] = iteration.bottleneck.quantized.index[i]
        return [found[i] for i in range(len(LENGTHS))]

    def with_lengths() -> list[Tensor]:
        tokens = ours.encode(images, FixedLength(LENGTHS))
        return [tokens[i].indices for i in range(len(LENGTHS))]

    return Contest(
        ready({"ours": with_lengths, "every iteration for all": all_iterations}),
        partial(agreement, expected=expected),
        Work(),
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "every iteration for all"))
def test_encode_with_lengths(name: str, race: Callable, quick: bool) -> None:
    group = f"encode {len(LENGTHS)} images, 96 tokens on average"
    race(group, name, lambda: encoding(quick), ROUNDS, WARMUP)


def encoding_to(tokens: int, quick: bool) -> Contest:
    """Contest of encoding every image to the same number of tokens."""
    ours = model(quick).eval()
    images = random_images(ours, 8 if GPU else 1)
    models = {"eager baseline": eager_copy(ours), "ours": ours}
    length = FixedLength(tokens)
    return Contest(
        ready({name: lambda m=m: [m.encode(images, length).indices] for name, m in models.items()}),
        agreement,
        Work(),
        against_first=True,
        notes={"images": len(images), "tokens": tokens},
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
@pytest.mark.parametrize("tokens", (32, 64, 128, 256) if GPU else (32, 256))
def test_encode_to(tokens: int, name: str, race: Callable, quick: bool) -> None:
    race(f"encode to {tokens} tokens", name, lambda: encoding_to(tokens, quick), ROUNDS, WARMUP)


def decoding(quick: bool) -> Contest:
    """Contest of decoding tokens of mixed lengths, as one packed batch or an image at a time."""
    ours = model(quick).eval()
    tokens = ours.encode(random_images(ours, len(LENGTHS)), FixedLength(LENGTHS))

    def alone() -> Tensor:
        return torch.cat([ours.decode(tokens[i]) for i in range(len(tokens))])

    return Contest(
        ready({"an image at a time": alone, "ours": lambda: ours.decode(tokens)}),
        partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3),
        Work(),
        against_first=True,
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "an image at a time"))
def test_decode(name: str, race: Callable, quick: bool) -> None:
    group = f"decode {len(LENGTHS)} images, 96 tokens on average"
    race(group, name, lambda: decoding(quick), ROUNDS, WARMUP)
