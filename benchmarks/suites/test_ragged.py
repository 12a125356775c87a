"""Ragged ops against eager formulations and a fresh copy of as many bytes.

64 sequences of up to 513 rows of 1024 float32; every output is fresh, as it is in use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import alit_kernels as ak
from alit_kernels.ragged.cases import BENCHMARK_CASES

from ..harness.contest import DEVICE, Contest, Work, ready

CASE, ADDED = BENCHMARK_CASES[0], 32
LONGEST, WIDTH = max(CASE.lengths), CASE.width


def lengths_of(small: bool) -> list[int]:
    return list(CASE.lengths[: 4 if small else None])


def contenders(
    lengths: list[int], device: str
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], int]]:
    """Op -> (ours, eager, number of rows that have to be read); both functions take no arguments."""
    padded = torch.randn(len(lengths), LONGEST, WIDTH, device=device)
    lengths_B = torch.tensor(lengths, device=device)
    total = sum(lengths)
    packed, offsets = ak.pack(padded, lengths_B, capacity=total)
    inside = torch.arange(LONGEST, device=device) < lengths_B[:, None]
    keep = torch.rand(total, device=device) > 0.25
    kept = int(keep.sum())
    fresh, fill = torch.randn(ADDED, WIDTH, device=device), torch.randn(WIDTH, device=device)
    half = lengths_B // 2
    tail = (torch.arange(LONGEST, device=device) >= half[:, None])[..., None]

    def grown() -> Tensor:
        pieces = packed.split(lengths)
        return torch.cat([part for piece in pieces for part in (piece, fresh)])

    capacity = total + len(lengths) * ADDED
    return {
        "pack": (
            lambda: ak.pack(padded, lengths_B, capacity=total)[0],
            lambda: padded[inside],
            total,
        ),
        "unpack": (
            lambda: ak.unpack(packed, offsets, max_length=max(lengths)),
            lambda: pad_sequence(packed.split(lengths), batch_first=True),
            total,
        ),
        "compact": (
            lambda: ak.compact(packed, offsets, keep, capacity=kept)[0],
            lambda: packed[keep],
            kept,
        ),
        "append": (lambda: ak.append(packed, offsets, fresh, capacity=capacity)[0], grown, total),
        "tail_mask": (
            lambda: ak.tail_mask(padded, half, fill),
            lambda: torch.where(tail, fill, padded),
            int(half.sum()),
        ),
    }


def contest(op: str, lengths: list[int]) -> Contest:
    ours, eager, rows = contenders(lengths, DEVICE)[op]
    expected = eager()
    source = expected.clone()
    return Contest(
        ready({"ours": ours, "eager": eager, "copy": source.clone}),
        partial(torch.testing.assert_close, expected=expected, rtol=0, atol=0),
        Work(4 * (rows * WIDTH + expected.numel())),
    )


@pytest.mark.parametrize("name", ("ours", "eager", "copy"))
@pytest.mark.parametrize("op", ("pack", "unpack", "compact", "append", "tail_mask"))
def test_ragged(op: str, name: str, race: Callable, quick: bool) -> None:
    lengths = lengths_of(quick)
    race(f"{op} {len(lengths)} sequences of 289 to 513", name, lambda: contest(op, lengths))
