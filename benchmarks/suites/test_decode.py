"""Decoding tokens of mixed lengths with ``tiny``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit import FixedLength

from ..harness.contest import Contest, Work
from .models import LENGTHS, ROUNDS, WARMUP, model, pictures


def decoding(quick: bool) -> Contest:
    """Tokens of mixed lengths to pixels, as one packed batch or a picture at a time."""
    ours = model(quick).eval()
    tokens = ours.encode(pictures(ours, len(LENGTHS)), FixedLength(LENGTHS))

    def alone() -> Tensor:
        return torch.cat([ours.decode(tokens[i]) for i in range(len(tokens))])

    calls = {"a picture at a time": alone, "ours": lambda: ours.decode(tokens)}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3),
        Work(),
        against_first=True,
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "a picture at a time"))
def test_decode(name: str, race: Callable, quick: bool) -> None:
    group = f"decode {len(LENGTHS)} pictures, 96 tokens on average"
    race(group, name, lambda: decoding(quick), ROUNDS, WARMUP)
