"""Cost of padding in attention on the CPU, forward and backward: ``python -m benchmarks.studies.padding``.

32 images of 32 to 256 latents, alone and with the class token and 256 image tokens that an encoder sees beside them;
width 512, 8 heads, float32. Packed rows, by our kernel and by one call of torch's fused attention for each sequence,
against torch's fused attention on padded rows with a key mask, the longest sequence being the padded length. Queries,
keys and values are read in place, as views of one projection, whose gradient is the result; "separate" gives each
side one contiguous tensor for each of them instead. Verified before timing, in turns, with one thread and with two; the
file holds every median.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alit_kernels import varlen_attention

from ..harness.contest import ready
from ..harness.timing import rounds, write
from ..peers.attention import Call, Problem, heads_first, ours
from ..suites.test_attention import HEAD_DIM, HEADS, contest

IMAGES, LATENTS = 32, (32, 256)
#: Name -> tokens beside the latents.
WORKLOADS = {"latents": 0, "latents and image": 257}


def in_place(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    """Call that returns output and gradients of ``function(q, k, v)`` for views of one projection (..., 3, H, D)."""
    *leaves, grad = inputs
    projection = torch.stack(leaves, -3).requires_grad_()

    def step() -> list[Tensor]:
        out = function(*projection.unbind(-3))
        return [out.detach(), *torch.autograd.grad(out, projection, grad)[0].unbind(-3)]

    return step


def contenders(problem: Problem) -> dict[str, Call]:
    """Name -> call that returns output and gradients of q, k and v."""

    def padded(*qkv: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in qkv)
        return masked(*heads, problem.inside[:, None, None]).transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    packed = partial(varlen_attention, offsets=problem.offsets, max_length=problem.longest)
    return {
        "packed": in_place(partial(packed, implementation="cpp"), problem.packed()),
        "packed, torch": in_place(partial(packed, implementation="torch"), problem.packed()),
        "padded, torch": in_place(padded, problem.padded()),
        "packed, separate": ours(problem),
        "padded, torch, separate": heads_first(problem, masked),
    }


def run(fixed: int, count: int) -> dict[str, Any]:
    low, high = LATENTS
    generator = torch.Generator().manual_seed(0)
    lengths = fixed + torch.randint(low, high + 1, (IMAGES,), generator=generator)
    sizes = tuple(lengths.tolist())
    race = contest(sizes, step=True)  # of the same numbers
    race.prepare = ready(contenders(Problem(sizes, HEADS, HEAD_DIM, torch.float32, step=True)))
    padded_work = IMAGES * int(lengths.max()) ** 2 / int(lengths.square().sum())
    results: dict[str, Any] = {"lengths": lengths.tolist(), "padded / true work": padded_work}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = race.medians(count)
    results["peak_megabytes"] = {name: race.peak_megabytes(name) for name in race.calls}
    return results


if __name__ == "__main__":
    count = rounds(__doc__, default=7)
    write("padding", {name: run(fixed, count) for name, fixed in WORKLOADS.items()})
