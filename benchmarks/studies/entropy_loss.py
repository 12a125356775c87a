"""Cost of LlamaGen's quantizer with its entropy loss: ``python -m benchmarks.studies.entropy_loss``.

A module of its interface, 16384 codes of 8 channels, normalized, in training: forward and backward of 16 images of
256 tokens, as it is and after ``alit_kernels.accelerate``. Losses and gradients are compared, then both are timed in
turns, two threads on a CPU; memory is that of one more step.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alit_kernels import accelerate
from alit_kernels._clock import clocks, samples_in_turns
from tests.helpers.peers import LlamaGenQuantizer

from ..harness.contest import DEVICE, THREADS
from ..harness.timing import OtherLoad, peak_megabytes, rounds, write

CODES, CHANNELS, IMAGES, SIDE = 16384, 8, 16, 16

Step = Callable[[], list[Tensor]]


def step(module: nn.Module, image: Tensor) -> Step:
    """Training step of a quantizer: returns its losses and the gradients of image and codebook."""
    leaves = image, module.embedding.weight

    def call() -> list[Tensor]:
        quantized, (codebook, commitment, entropy, _), _ = module(image)
        losses = [quantized.square().mean(), codebook, commitment, entropy]
        return [*(x.detach() for x in losses), *torch.autograd.grad(sum(losses), leaves)]

    return call


def steps(codes: int, images: int) -> dict[str, Step]:
    torch.manual_seed(0)
    eager = LlamaGenQuantizer(codes, CHANNELS, cosine=True, entropy=0.1).to(DEVICE).train()
    ours = copy.deepcopy(eager)
    accelerate(nn.Sequential(ours), strict=True)
    image = torch.randn(images, CHANNELS, SIDE, SIDE, device=DEVICE, requires_grad=True)
    return {"eager": step(eager, image), "accelerated": step(ours, image)}


def measure(codes: int, images: int, count: int) -> dict[str, Any]:
    calls = steps(codes, images)
    found, expected = calls["accelerated"](), calls["eager"]()
    errors = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    ]
    assert max(errors) < 1e-4, errors
    del found, expected
    with OtherLoad() as other:
        times = samples_in_turns(clocks(calls), rounds=count)
    medians = {name: statistics.median(each) for name, each in times.items()}
    memory = {name: peak_megabytes(call) for name, call in calls.items()}
    return {
        "shape": f"{images * SIDE**2} x {codes} x {CHANNELS}",
        "ms": {name: round(1e3 * seconds, 1) for name, seconds in medians.items()},
        "times faster": round(medians["eager"] / medians["accelerated"], 1),
        "peak MB": {name: round(each, 1) for name, each in memory.items()},
        "largest relative difference": max(errors),
        "processors that others used, percent": other.percent,
    }


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    write("entropy_loss", measure(CODES, IMAGES, rounds(__doc__, default=7)))
