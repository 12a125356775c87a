"""Time of adaptive encoding of photographs: ``python -m benchmarks.studies.adaptive encode`` and ``... stream``.

``encode``: lengths given, or decided by pixel or by code error, against the published rule, which runs and decodes
every iteration (``compatibility="official"``). ``stream``: ``encode_stream`` against batch-by-batch ``encode`` at mixed
lengths. Weights are random: they cost what trained ones cost. Thresholds come from a recorded rollout, one for each
image and iteration, so that lengths are those stated. Tokens are held against those of given lengths, or of batches.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alit import AdaptiveTokenizer, CodeError, FixedLength, MaxL1, TokenSequence
from alit.demo import photographs
from alit.iteration import Iteration
from alit.model import AdaptiveModel

from ..harness.contest import THREADS, ceilings
from ..harness.timing import write

SIZE, STREAM, BATCH = "small", 64, 8
#: Tokens of eight photos, 96 on average; also of every eight images of the stream.
LENGTHS = (32, 256, 64, 96, 32, 128, 64, 96)


class Recorded:
    """Stopping criterion with the error of ``kind`` and recorded thresholds that stop each image at its length."""

    needs_prediction = True

    @torch.no_grad()
    def __init__(
        self,
        kind: type[MaxL1] | type[CodeError],
        model: AdaptiveTokenizer,
        images: Tensor,
        lengths: Tensor,
    ) -> None:
        self.error = kind(0.0).error
        errors_IB = torch.stack([self.error(x, model) for x in model.rollout(images)])
        last_B = lengths // model.config.latents_per_iteration - 1
        at_end = torch.arange(len(errors_IB))[:, None] == last_B
        self.thresholds_IB = torch.where(at_end, 1.01, 0.99) * errors_IB

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        threshold_B = self.thresholds_IB[iteration.index, iteration.image_index_B]
        return self.error(iteration, model) < threshold_B


def verify(name: str, found: TokenSequence, expected: TokenSequence) -> None:
    """Check that lengths are equal, and indices up to 0.5 %, since codes can be equally near."""
    assert found.indices is not None and expected.indices is not None
    assert torch.equal(found.lengths, expected.lengths), f"{name}: {found.lengths.tolist()} tokens"
    share = float((found.indices != expected.indices).float().mean())
    assert share <= 0.005, f"{name}: {share:.1%} of the indices differ from the expected ones"


#: "cpu" is CPU time of all threads, which other processes on the machine disturb less.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def race(
    contenders: dict[str, Callable[[], TokenSequence]],
    images: int,
    rounds: int,
    expected: TokenSequence | None = None,
) -> dict[str, Any]:
    """Seconds per image, best of the rounds, and the first contender's over each other one's, by clock.

    Tokens of the other contenders are checked against ``expected``, by default the first one's.
    """
    baseline, *others = contenders
    best = {clock: dict.fromkeys(contenders, math.inf) for clock in CLOCKS}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = {clock: now() for clock, now in CLOCKS.items()}
            tokens = call()
            for clock, now in CLOCKS.items():
                best[clock][name] = min(best[clock][name], now() - start[clock])
            expected = tokens if expected is None else expected
            if name != baseline:
                verify(name, tokens, expected)
    result: dict[str, Any] = {
        "rounds": rounds,
        "matmul_gflops": round(ceilings()["matmul_gigaflops"]),
    }
    for clock, seconds in best.items():
        result[clock] = {
            "seconds_per_image": {name: round(x / images, 3) for name, x in seconds.items()},
            f"times_faster_than_{baseline}": {
                name: round(seconds[baseline] / seconds[name], 2) for name in others
            },
        }
    return result


def encode(rounds: int) -> dict[str, Any]:
    lengths = torch.tensor(LENGTHS)
    images = torch.stack(list(photographs(256).values())[: len(LENGTHS)])
    torch.manual_seed(0)
    model = AdaptiveTokenizer.from_size(SIZE).eval()
    official = AdaptiveTokenizer.from_size(SIZE, compatibility="official").eval()
    official.load_state_dict(model.state_dict())
    by_pixels, by_codes = (Recorded(kind, model, images, lengths) for kind in (MaxL1, CodeError))
    given = FixedLength(lengths)
    contenders = {
        "official": lambda: official.encode(images, MaxL1(0.0)),
        "pixel L1": lambda: model.encode(images, by_pixels),
        "CodeError": lambda: model.encode(images, by_codes),
        "lengths given": lambda: model.encode(images, given),
    }
    found = race(contenders, len(images), rounds, model.encode(images, given))
    return {"size": SIZE, "photos": len(images), "lengths": lengths.tolist(), **found}


def stream(rounds: int) -> dict[str, Any]:
    photos = list(photographs(256).values())
    images = torch.stack([photos[i % len(photos)] for i in range(STREAM)])
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(STREAM)])
    torch.manual_seed(0)
    model = AdaptiveTokenizer.from_size(SIZE).eval()
    # The stream may hold as many rows as a batch.
    rows = BATCH * (model.num_image_tokens + model.config.max_tokens)

    def by_batches() -> TokenSequence:
        pieces = zip(images.split(BATCH), lengths.split(BATCH), strict=True)
        return TokenSequence.concatenate([model.encode(x, FixedLength(n)) for x, n in pieces])

    def by_stream() -> TokenSequence:
        found = model.encode_stream(images, FixedLength(lengths), max_tokens_in_flight=rows)
        return TokenSequence.concatenate(list(found))

    found = race({"batches": by_batches, "stream": by_stream}, STREAM, rounds)
    return {"size": SIZE, "images": STREAM, "batch": BATCH, "max_tokens_in_flight": rows, **found}


PARTS = {"encode": encode, "stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    write("adaptive", PARTS[options.part](options.rounds), part=options.part)


if __name__ == "__main__":
    main()
