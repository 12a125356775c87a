"""Packed sampling against padded batches: ``python -m benchmarks.studies.generation_packed``.

Samples of about 96 tokens on average, of lengths from 32 to 256, as ``alit.generation.sample`` draws them, where an
ended sequence leaves and another takes its place, against padded batches, which run until their longest has ended. Both
keep keys and values, and draw the same tokens from the same numbers: compared before anything is timed. In turns, in
one process with one thread; weights are random, and ends are drawn by position. The file holds seconds of every round,
of the clock and of the process, and the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alit.generation import Generator, GeneratorConfig
from alit.generation.autoregressive import Wanted, autoregressive, next_token
from alit.generation.drawing import Sharpness, chance
from alit_kernels import attention

from ..harness.timing import OtherLoad, rounds, write
from .adaptive import CLOCKS, LENGTHS

#: A generator for the tokens of the shipped tokenizer.
CONFIG = GeneratorConfig(
    fingerprint="0" * 32,
    codebook_size=4096,
    image_size=(256, 256),
    max_tokens=256,
    codebook_span=32,
    width=256,
    layers=6,
    heads=4,
)
COUNT, BATCH = 192, 64


class Ending(Generator):
    """Generator whose end tokens have the probabilities that make lengths distributed as ``LENGTHS``."""

    def scored(self, x_TC: Tensor, position_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        counts = torch.tensor(LENGTHS).bincount(minlength=self.config.max_tokens + 1)
        ends = counts / counts.flip(0).cumsum(0).flip(0).clamp(min=1)
        for rows, logits in super().scored(x_TC, position_T):
            others = logits[:, :-1].logsumexp(-1)
            logits[:, -1] = others + ends[position_T[rows]].logit()
            yield rows, logits


def packed(generator: Generator) -> list[Tensor]:
    return autoregressive(generator, wanted(), Sharpness(), BATCH, lambda done: None)


def padded(generator: Generator) -> list[Tensor]:
    samples = wanted()
    batches = (samples[first : first + BATCH] for first in range(0, COUNT, BATCH))
    return [tokens for batch in batches for tokens in padded_batch(generator, batch)]


def padded_batch(generator: Generator, samples: list[Wanted]) -> list[Tensor]:
    """Tokens of each sample of a padded batch, which draws a token for every row until all have ended."""
    config, count = generator.config, len(samples)
    longest = config.max_tokens
    uniform_BN = torch.stack([torch.rand(longest, generator=random) for _, random in samples])
    shape = count, longest, config.heads, config.width // config.heads
    keys = [torch.zeros(shape) for _ in range(config.layers)]
    values = [torch.zeros(shape) for _ in range(config.layers)]
    token_BN = torch.zeros(count, longest, dtype=torch.int64)
    length_B = torch.full((count,), longest)
    slot_B = generator.class_slot(torch.zeros(count, dtype=torch.int64))
    for place in range(longest):

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, place: int = place) -> Tensor:
            keys[layer][:, place], values[layer][:, place] = k, v
            seen = slice(place + 1)
            return attention(q[:, None], keys[layer][:, seen], values[layer][:, seen])[:, 0]

        position_B = torch.full((count,), place)
        x_BC = generator(slot_B, position_B, None, attend)
        token_B = next_token(generator, x_BC, position_B, uniform_BN[:, place], Sharpness())
        length_B[(token_B == config.codebook_size) & (length_B == longest)] = place
        token_BN[:, place] = token_B
        slot_B = generator.code_slot(token_B, position_B)
        if bool((length_B < longest).all()):
            break
    return [row[:length] for row, length in zip(token_BN, length_B.tolist(), strict=True)]


def wanted() -> list[Wanted]:
    return [(0, chance(0, number)) for number in range(COUNT)]


def main(count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = Ending(CONFIG).eval()
    contenders: dict[str, Callable[[Generator], list[Tensor]]] = {
        "packed": packed,
        "padded": padded,
    }
    with torch.no_grad(), OtherLoad() as load:
        found = [call(generator) for call in contenders.values()]
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)), "other tokens"
        seconds: dict[str, dict[str, list[float]]] = {
            clock: {name: [] for name in contenders} for clock in CLOCKS
        }
        for _ in range(count):
            for name, call in contenders.items():
                start = {clock: now() for clock, now in CLOCKS.items()}
                call(generator)
                for clock, now in CLOCKS.items():
                    seconds[clock][name].append(now() - start[clock])
    ratios = {
        clock: [y / x for x, y in zip(times["packed"], times["padded"], strict=True)]
        for clock, times in seconds.items()
    }
    lengths = [len(x) for x in found[0]]
    results = {
        "samples": COUNT,
        "in_flight": BATCH,
        "mean_tokens": statistics.mean(lengths),
        "longest": max(lengths),
        "seconds": seconds,
        "padded_over_packed": {clock: statistics.median(x) for clock, x in ratios.items()},
        "lowest_ratio": {clock: min(x) for clock, x in ratios.items()},
        "other_load_percent": load.percent,
    }
    write("generation_packed", results)


if __name__ == "__main__":
    main(rounds(__doc__, default=5))
