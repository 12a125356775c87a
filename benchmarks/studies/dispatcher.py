"""Time saved by bypassing torch's dispatcher in a cheap op: ``python -m benchmarks.studies.dispatcher``.

The op is tail_mask on one token, on one thread; both ways in turns, medians in microseconds of that thread.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable

import torch
from torch import Tensor

from alit_kernels._library import ops

from ..harness.timing import write

CALLS, ROUNDS = 50, 51


def prepared(forward: Callable[..., Tensor], requires_grad: bool) -> Callable[[], object]:
    tokens = torch.ones(1, 1, 4, requires_grad=requires_grad)
    lengths, fill = torch.tensor([1]), torch.zeros(4)
    if not requires_grad:
        return lambda: forward(tokens, lengths, fill)
    return lambda: torch.autograd.grad(forward(tokens, lengths, fill).sum(), tokens)


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for requires_grad in (False, True):
        ways = {
            "dispatcher": lambda *x: torch.ops.alit_kernels.tail_mask(*x, "auto"),
            "around it": ops()["tail_mask"],
        }
        calls = {name: prepared(way, requires_grad) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(
                    timeit.timeit(call, time.thread_time, number=CALLS) / CALLS * 1e6
                )
        kind = "forward and backward" if requires_grad else "forward"
        found[kind] = {name: round(statistics.median(each), 1) for name, each in times.items()}
    write("dispatcher", found)


if __name__ == "__main__":
    main()
