"""What padding costs attention on the CPU, forward and backward: ``python -m benchmarks.studies.padding``.

32 pictures of 32 to 256 latents, alone and with the class token and 256 image tokens that an encoder sees beside them;
width 512, 8 heads, float32. Packed rows, by our kernel and by one call of torch's fused attention for each sequence,
against torch's fused attention on padded rows with a key mask, the longest sequence being the padded length. Queries,
keys and values are read in place, as views of one projection, whose gradient is the result; "separate" gives each
side one contiguous tensor for each of them instead. Verified before timing, in turns, with one thread and with two; the
file holds every median.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alit_kernels import varlen_attention

from ..harness.contest import ready
from ..harness.timing import write
from ..peers.attention import Call, Problem, ours
from ..suites.test_attention import HEAD_DIM, HEADS, contest

PICTURES, LATENTS = 32, (32, 256)
#: Name -> tokens beside the latents.
WORKLOADS = {"latents": 0, "latents and image": 257}


def in_place(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """Gradients of ``function(q, k, v)``, views of one projection (..., 3, H, D), by way of the projection's."""
    *leaves, grad = inputs
    projection = torch.stack(leaves, -3).requires_grad_()

    def step() -> list[Tensor]:
        out = function(*projection.unbind(-3))
        return [out.detach(), *torch.autograd.grad(out, projection, grad)[0].unbind(-3)]

    return step


def contenders(problem: Problem) -> dict[str, Call]:
    """Name -> call that returns output and gradients of q, k and v."""
    mask = problem.inside[:, None, None]

    def padded(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    *separate, grad = problem.padded()
    heads_first = [x.transpose(1, 2).contiguous().requires_grad_() for x in separate]

    def padded_separate() -> list[Tensor]:
        out = padded(*(x.transpose(1, 2) for x in heads_first))
        gradients = torch.autograd.grad(out, heads_first, grad)
        return [out.detach(), *(x.transpose(1, 2) for x in gradients)]

    packed = partial(varlen_attention, offsets=problem.offsets, max_length=problem.longest)
    return {
        "packed": in_place(partial(packed, implementation="cpp"), problem.packed()),
        "packed, torch": in_place(partial(packed, implementation="torch"), problem.packed()),
        "padded, torch": in_place(padded, problem.padded()),
        "packed, separate": ours(problem),
        "padded, torch, separate": padded_separate,
    }


def run(fixed: int, rounds: int) -> dict[str, Any]:
    low, high = LATENTS
    generator = torch.Generator().manual_seed(0)
    lengths = fixed + torch.randint(low, high + 1, (PICTURES,), generator=generator)
    sizes = tuple(lengths.tolist())
    race = contest(sizes, step=True)  # of the same numbers
    race.prepare = ready(contenders(Problem(sizes, HEADS, HEAD_DIM, torch.float32, step=True)))
    padded_work = PICTURES * int(lengths.max()) ** 2 / int(lengths.square().sum())
    results: dict[str, Any] = {"lengths": lengths.tolist(), "padded / true work": padded_work}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = race.medians(rounds)
    results["peak_megabytes"] = {name: race.peak_megabytes(name) for name in race.calls}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results = {name: run(fixed, rounds) for name, fixed in WORKLOADS.items()}
    table = Table("workload", "", "1 thread", "2 threads", "peak MB", title="seconds (relative)")
    for workload, result in results.items():
        for name, peak in result["peak_megabytes"].items():
            seconds = [result[f"{threads} threads"] for threads in (1, 2)]
            cells = [f"{s[name]:.3f} ({s[name] / s['packed']:.2f})" for s in seconds]
            table.add_row(workload, name, *cells, f"{peak:.0f}")
    Console().print(table)
    print(write("padding", results))


if __name__ == "__main__":
    main()
