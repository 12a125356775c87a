"""What adaptive encoding saves, on photographs: ``python -m benchmarks.studies.adaptive encode`` and ``... stream``.

``encode``: lengths given, or decided by pixel or by code error, against the published rule, which runs and decodes
every iteration (``compatibility="official"``). ``stream``: ``encode_stream`` against batch-by-batch ``encode`` at mixed
lengths. Weights are random: they cost what trained ones cost. Thresholds come from a recorded rollout, one for each
image and iteration, so that lengths are those stated. Results are compared with the recording before they are written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alit import AdaptiveTokenizer, CodeError, FixedLength, MaxL1, TokenSequence
from alit.criteria import Criterion
from alit.demo import photographs
from alit.iteration import Iteration
from alit.model import AdaptiveModel

from ..harness.contest import THREADS, ceilings
from ..harness.timing import write

SIZE, STREAM, BATCH = "small", 64, 8
#: Tokens of eight photos, 96 on average; also of every eight images of the stream.
LENGTHS = (32, 256, 64, 96, 32, 128, 64, 96)


class Recorded:
    """``kind``'s error, computed as ever, against a threshold for each image and iteration."""

    needs_prediction = True

    def __init__(self, kind: type[MaxL1] | type[CodeError], thresholds_IB: Tensor) -> None:
        self.kind, self.thresholds_IB = kind(0.0), thresholds_IB

    def __call__(self, iteration: Iteration, model: AdaptiveModel) -> Tensor:
        threshold_B = self.thresholds_IB[iteration.index, iteration.image_index_B]
        return self.kind.error(iteration, model) < threshold_B


@torch.no_grad()
def record(
    model: AdaptiveTokenizer, images: Tensor, lengths: Tensor
) -> tuple[dict[str, Criterion], TokenSequence]:
    """Criteria that stop each image at its length, and the tokens there."""
    kinds = {"pixel L1": MaxL1, "CodeError": CodeError}
    errors: dict[str, list[Tensor]] = {name: [] for name in kinds}
    tokens: list[Tensor] = [torch.empty(0)] * len(images)
    for iteration in model.rollout(images):
        for name, kind in kinds.items():
            errors[name].append(kind(0.0).error(iteration, model))
        assert iteration.bottleneck.quantized is not None
        for b in (lengths == iteration.num_tokens).nonzero()[:, 0].tolist():
            tokens[b] = iteration.bottleneck.quantized.index[b]
        if iteration.num_tokens == int(lengths.max()):
            break
    last_B = lengths // model.config.latents_per_iteration - 1
    criteria: dict[str, Criterion] = {}
    for name, kind in kinds.items():
        found_IB = torch.stack(errors[name])
        at_end = torch.arange(len(found_IB))[:, None] == last_B
        criteria[name] = Recorded(kind, torch.where(at_end, 1.01, 0.99) * found_IB)
    return criteria, TokenSequence(lengths, indices=torch.cat(tokens))


def verify(name: str, found: TokenSequence, expected: TokenSequence) -> None:
    """Lengths are equal; so are indices, but for a few that are as near as the others."""
    assert found.indices is not None and expected.indices is not None
    if not torch.equal(found.lengths, expected.lengths):
        raise AssertionError(f"{name}: lengths {found.lengths.tolist()} differ from the recording")
    share = float((found.indices != expected.indices).float().mean())
    if share > 0.005:
        raise AssertionError(f"{name}: {share:.1%} of the indices differ from the recording")


class Seconds(NamedTuple):
    """``wall``, and the processor time of all threads, which other work on the machine disturbs less."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def race(
    contenders: dict[str, Callable[[], TokenSequence]],
    images: int,
    rounds: int,
    expected: TokenSequence | None = None,
) -> dict[str, Any]:
    """Seconds an image, best of the rounds, and the first contender's over each, by either clock.

    The others' tokens are held against ``expected``, or against the first one's.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    baseline = next(iter(contenders))
    for _ in range(rounds):
        for name, call in contenders.items():
            seconds, tokens = timed(call)
            times[name].append(seconds)
            if expected is None:
                expected = tokens
            if name != baseline:
                verify(name, tokens, expected)
    result: dict[str, Any] = {
        "rounds": rounds,
        "matmul_gflops": round(ceilings()["matmul_gigaflops"]),
    }
    for clock in Seconds._fields:
        best = {name: min(getattr(x, clock) for x in values) for name, values in times.items()}
        result[clock] = {
            "seconds_per_image": {name: round(x / images, 3) for name, x in best.items()},
            f"times_faster_than_{baseline}": {
                name: round(best[baseline] / x, 2) for name, x in best.items() if name != baseline
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
    criteria, expected = record(model, images, lengths)
    criteria["lengths given"] = FixedLength(lengths)
    contenders = {"official": lambda: official.encode(images, MaxL1(0.0))}
    contenders |= {
        name: lambda criterion=criterion: model.encode(images, criterion)
        for name, criterion in criteria.items()
    }
    found = race(contenders, len(images), rounds, expected)
    return {"size": SIZE, "photos": len(images), "lengths": lengths.tolist(), **found}


def stream(rounds: int) -> dict[str, Any]:
    photos = list(photographs(256).values())
    images = torch.stack([photos[i % len(photos)] for i in range(STREAM)])
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(STREAM)])
    torch.manual_seed(0)
    model = AdaptiveTokenizer.from_size(SIZE).eval()
    # The bound is what the batches need.
    rows = BATCH * (model.num_image_tokens + model.config.max_tokens)

    def by_batches() -> TokenSequence:
        pieces = zip(images.split(BATCH), lengths.split(BATCH), strict=True)
        return TokenSequence.concatenate([model.encode(x, FixedLength(n)) for x, n in pieces])

    def by_stream() -> TokenSequence:
        found = model.encode_stream(images, FixedLength(lengths), max_tokens_in_flight=rows)
        return TokenSequence.concatenate(list(found))

    found = race({"batches": by_batches, "stream": by_stream}, STREAM, rounds)
    return {
        "size": SIZE, "images": STREAM, "batch": BATCH, "max_tokens_in_flight": rows, **found
    }  # fmt: skip


PARTS = {"encode": encode, "stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    result = PARTS[options.part](options.rounds)
    for key, value in result.items():
        print(f"{key}: {value}")
    print(write("adaptive", result, part=options.part))


if __name__ == "__main__":
    main()
