"""What ``fused_sdpa`` costs the calls that it passes on: ``python -m benchmarks.studies.sdpa_context``.

Calls on a few numbers, on one thread, with the context and without it in turns; medians in microseconds of that thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from alit_kernels import fused_sdpa

from ..harness.timing import write

CALLS, ROUNDS = 500, 51


def calls() -> dict[str, Callable[[], object]]:
    q, narrow, weight = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 4), torch.ones(8, 8)
    masks = {
        "additive mask": torch.zeros(4, 4),
        "mask of queries": torch.ones(4, 4) > 0,
        "mask of heads": torch.ones(1, 2, 1, 4) > 0,
    }
    attend = scaled_dot_product_attention
    return {
        "causal": lambda: attend(q, q, q, is_causal=True),
        **{name: lambda m=mask: attend(q, q, q, m) for name, mask in masks.items()},  # type: ignore[misc]
        "value channels": lambda: attend(q, q, narrow),
        "another function: add": lambda: q + q,
        "another function: linear": lambda: linear(q, weight),
    }


def microseconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, call in calls().items():
        alone, within = [], []
        for _ in range(ROUNDS):
            alone.append(microseconds(call))
            with fused_sdpa():
                within.append(microseconds(call))
        times = [statistics.median(each) for each in (alone, within)]
        added = round(times[1] - times[0], 1)
        found[name] = {"alone": round(times[0], 1), "within": round(times[1], 1), "added": added}
    write("sdpa_context", found)


if __name__ == "__main__":
    main()
