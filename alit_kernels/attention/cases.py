"""Inputs of the attention ops: one builder, one list of test shapes, one of benchmark shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ragged.reference import cumulative_offsets
from .problem import Problem


class Case(NamedTuple):
    """Query lengths, heads, head dimension; key lengths where they differ; unused rows; whether keys are masked; where
    queries stop: "causal", or anywhere and beyond ("random").
    """

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    key_lengths: tuple[int, ...] | None = None
    spare: int = 0
    masked: bool = False
    magnitude: float = 1.0
    stops: str = ""


TEST_CASES = (
    Case((5,), 2, 8),
    Case((3, 1, 7), 2, 16),
    Case((0, 4, 0, 2), 1, 8, spare=3),
    Case((0, 0), 2, 4, spare=1),
    Case((), 2, 4, spare=1),
    Case((2, 0, 5), 2, 8, key_lengths=(4, 3, 0)),
    Case((9, 17, 33), 2, 16, masked=True, spare=5),
    Case((6, 3), 1, 8, magnitude=100.0),
    Case((6, 3), 2, 8, magnitude=0.0),
    Case((1, 15, 16, 17, 0, 63, 64, 65), 1, 16, spare=70),
    Case((129,), 1, 12),
    Case((40, 70), 1, 20, key_lengths=(80, 33), masked=True),
    Case((70, 3), 1, 64),
    Case((33, 66), 1, 128, masked=True),
    Case((65, 1, 0, 130), 2, 16, spare=2, stops="causal"),
    Case((70, 3, 40), 1, 20, key_lengths=(80, 0, 300), stops="random"),
    Case((9, 17, 33), 2, 64, masked=True, spare=5, stops="random"),
    Case((5, 0, 33), 1, 144, masked=True, spare=3),
    Case((40, 3), 1, 256, key_lengths=(35, 70), stops="random"),
    Case((5, 35), 1, 512, masked=True, stops="causal"),
    Case((20,), 1, 512, spare=1),
)
#: Slow in Triton's interpreter.
LONG_CASES = (
    Case((127, 129, 257, 0, 289), 1, 16),
    Case((513,), 1, 64),
    Case((300, 70), 1, 16, masked=True, stops="random"),
)
BENCHMARK_CASES = tuple(Case((length,) * 32, 8, 64) for length in range(289, 514, 32))


def make(
    case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Problem:
    """Problem of packed q, k, v; what must not be read is not finite. A masked case loses a third of the keys."""
    generator = torch.Generator().manual_seed(seed)
    key_lengths = case.lengths if case.key_lengths is None else case.key_lengths

    def rows(lengths: tuple[int, ...], magnitude: float) -> Tensor:
        used, shape = sum(lengths), (sum(lengths) + case.spare, case.heads, case.head_dim)
        packed = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
        packed[used:] = torch.nan
        return packed.to(device, dtype)

    def offsets(lengths: tuple[int, ...]) -> Tensor:
        return cumulative_offsets(torch.tensor(lengths, dtype=torch.int64)).to(device)

    q, k = rows(case.lengths, case.magnitude), rows(key_lengths, case.magnitude)
    v, key_mask = rows(key_lengths, 1.0), None
    if case.masked:
        key_mask = (torch.rand(k.shape[0], generator=generator) > 1 / 3).to(device)
        key_mask[: key_lengths[0]] = False  # the first sequence is left without a key
        k[~key_mask], v[~key_mask] = torch.nan, torch.inf
    key_stop = None
    if case.stops == "causal":
        key_stop = torch.cat([torch.arange(1, n + 1) for n in (*case.lengths, case.spare)])
    elif case.stops == "random":
        key_stop = torch.randint(-9, 99, q.shape[:1], generator=generator)
        key_stop[::7] = 2**31 - 1
    return Problem(
        q=q,
        k=k,
        v=v,
        offsets=offsets(case.lengths),
        key_offsets=None if case.key_lengths is None else offsets(key_lengths),
        max_length=max(case.lengths, default=0) + 1,
        max_key_length=max(key_lengths, default=0) + 1,
        key_mask=key_mask,
        key_stop=None if key_stop is None else key_stop.to(device, torch.int32),
        scale=case.head_dim**-0.5,
    )
