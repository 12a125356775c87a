"""Time of attention with stops on the CPU: ``python -m benchmarks.studies.stops``.

Causal order, a prefix that all queries see, and the blocks of a model of ten scales (1 x 1 to 16 x 16 tokens, each
seeing itself and those before), as stops of our kernel, against our kernel on all pairs and against torch's
``scaled_dot_product_attention`` with the mask of pairs that says the same. One head of 256 and 512 channels, as a VQGAN
has it, against the same written out with ``torch.bmm``. float32; forward, and forward with backward; verified, then in
turns, with two threads. The file holds every median in seconds, and the share of other programs in the processors' time
meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alit_kernels import attention, stops_blocks, stops_causal
from alit_kernels._clock import clocks, samples_in_turns

from ..harness.contest import THREADS, assert_near
from ..harness.timing import OtherLoad, rounds, write

SCALES = tuple(side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
#: Name -> stops of every query.
STOPS = {
    "causal, 1024 tokens": stops_causal(1024),
    "prefix of 256 of 1024 tokens": torch.full((1024,), 256, dtype=torch.int32),
    "ten blocks, 680 tokens": stops_blocks(SCALES),
}
BATCH, HEADS, HEAD_DIM = 1, 8, 64
#: Batch, tokens, channels of one head.
WIDE = tuple((b, n, d) for d in (256, 512) for b, n in ((1, 256), (8, 256), (1, 1024)))

Function = Callable[[Tensor, Tensor, Tensor], Any]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, (B, N, 1, D), written with ``torch.bmm``."""
    queries, keys, values = (x.squeeze(2) for x in (q, k, v))
    scores = torch.bmm(queries, keys.transpose(1, 2)) * queries.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(-1), values).unsqueeze(2)


def race(
    shape: tuple[int, ...], functions: Mapping[str, Function], alike: tuple[str, str], count: int
) -> dict[str, Any]:
    """Median seconds of the functions, forward and step; checks that the two named in ``alike`` return the same."""
    *leaves, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for step in (False, True):
        inputs = [x.clone().requires_grad_(step) for x in leaves]

        def call(
            function: Function, inputs: list[Tensor] = inputs, step: bool = step
        ) -> list[Tensor]:
            with torch.set_grad_enabled(step):
                out = function(*inputs)
            gradients = torch.autograd.grad(out, inputs, grad) if step else ()
            return [out.detach(), *gradients]

        calls = {name: partial(call, function) for name, function in functions.items()}
        first, second = (calls[name]() for name in alike)
        assert_near(first, second, 1e-4)
        with OtherLoad() as load:
            samples = samples_in_turns(clocks(calls), rounds=count)
        found["step" if step else "forward"] = {
            **{name: statistics.median(times) for name, times in samples.items()},
            "other_load_percent": load.percent,
        }
    return found


def main(count: int) -> None:
    torch.set_num_threads(THREADS)
    results: dict[str, Any] = {}
    for name, stops in STOPS.items():
        tokens = len(stops)
        mask = torch.arange(tokens) < stops[:, None]
        functions: dict[str, Function] = {
            "stops": partial(attention, key_stop=stops),
            "all pairs": attention,
            "torch, mask": partial(masked, mask=mask),
        }
        shape = BATCH, tokens, HEADS, HEAD_DIM
        results[name] = race(shape, functions, ("stops", "torch, mask"), count)
    for batch, tokens, width in WIDE:
        name = f"one head of {width} channels, {batch} x {tokens} tokens"
        against: dict[str, Function] = {"ours": attention, "bmm": written_out}
        results[name] = race((batch, tokens, 1, width), against, ("ours", "bmm"), count)
    write("stops", results)


if __name__ == "__main__":
    main(rounds(__doc__, default=15))
