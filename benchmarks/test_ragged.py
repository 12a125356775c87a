"""Ragged ops against eager formulations and a fresh copy of as many bytes, float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .contest import DEVICE, Contest, Work
from .ragged import LENGTHS, contenders

NAMES = ("ours", "eager", "copy")


def contest(op: str, lengths: list[int]) -> Contest:
    ours, eager = contenders(lengths, DEVICE)[op]
    expected = eager()
    source = expected.clone()

    def verify(result: Tensor) -> None:
        assert torch.equal(result, expected), "differs from eager"

    calls = {"ours": ours, "eager": eager, "copy": source.clone}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        verify,
        Work(2 * expected.numel() * 4),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", ("pack", "unpack", "compact", "append", "tail_mask"))
def test_ragged(op: str, name: str, race: Callable, quick: bool) -> None:
    lengths = LENGTHS["289 to 513"][: 4 if quick else None]
    race(f"{op} {len(lengths)} sequences of 289 to 513", name, lambda: contest(op, lengths))
