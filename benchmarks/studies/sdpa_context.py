"""Overhead of ``fused_sdpa`` for calls that it passes on: ``python -m benchmarks.studies.sdpa_context``.

Calls on tiny tensors, and calls that it computes itself, whose queries see prefixes of the keys. On one thread, without
a context, within one that passes everything on, and within ours, in turns; medians in microseconds of that thread.
``added`` is the time within ours less that without, ``of ours`` less that within the other: the rest is torch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from alit_kernels import fused_sdpa, stops_prefix

from ..harness.timing import write

CALLS, ROUNDS = 500, 51
TAKEN_CALLS, TAKEN_ROUNDS = 5, 21
Calls = dict[str, Callable[[], object]]


def passed_on() -> Calls:
    q, narrow, weight = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 4), torch.ones(8, 8)
    wide = q.double()
    masks = {
        "additive mask": torch.zeros(4, 4),
        "mask of queries": torch.ones(4, 4) > 0,
        "mask of heads": torch.ones(1, 2, 1, 4) > 0,
    }
    attend = scaled_dot_product_attention
    return {
        "float64": lambda: attend(wide, wide, wide, is_causal=True),
        **{name: lambda m=mask: attend(q, q, q, m) for name, mask in masks.items()},  # type: ignore[misc]
        "value channels": lambda: attend(q, q, narrow),
        "another function: add": lambda: q + q,
        "another function: linear": lambda: linear(q, weight),
    }


def taken(length: int) -> Calls:
    """Name -> call that ``fused_sdpa`` computes: 8 heads of 64 channels, a prefix of 32."""
    q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    mask = torch.arange(length) < stops_prefix(length, 32)[:, None]
    banded = mask & ~mask.tril(-length // 2)
    attend = scaled_dot_product_attention

    def step(**options: object) -> None:
        with torch.enable_grad():
            attend(q, k, v, **options).sum().backward()  # type: ignore[arg-type]

    return {
        f"causal, {length} tokens": lambda: attend(q, k, v, is_causal=True),
        f"causal, {length} tokens, and backward": lambda: step(is_causal=True),
        f"prefix mask, {length} tokens": lambda: attend(q, k, v, mask),
        f"prefix mask, {length} tokens, and backward": lambda: step(attn_mask=mask),
        f"banded mask, {length} tokens": lambda: attend(q, k, v, banded),  # read, and passed on
    }


def microseconds(call: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls * 1e6


class PassesOn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


def measured(call: Callable[[], object], calls: int, rounds: int) -> dict[str, float]:
    contexts = {"alone": nullcontext, "passed on by another": PassesOn, "within": fused_sdpa}
    found: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(rounds):
        for name, context in contexts.items():
            with context():
                found[name].append(microseconds(call, calls))
    times = {name: round(statistics.median(each), 1) for name, each in found.items()}
    times["added"] = round(times["within"] - times["alone"], 1)
    times["of ours"] = round(times["within"] - times["passed on by another"], 1)
    return times


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    found = {name: measured(call, CALLS, ROUNDS) for name, call in passed_on().items()}
    for length in (128, 256, 512):
        for name, call in taken(length).items():
            found[name] = measured(call, TAKEN_CALLS, TAKEN_ROUNDS)
    write("sdpa_context", found)


if __name__ == "__main__":
    main()
