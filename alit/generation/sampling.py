"""Sampling from a generator, autoregressive or masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..checks import check_choice, check_number, shown
from ..sequence import TokenSequence
from .autoregressive import autoregressive
from .drawing import Sharpness, chance
from .masked import masked
from .model import Generator

#: Steps in which masked tokens are filled in.
STEPS = 12
MOST = 2**20


class Samples(NamedTuple):
    """Result of :func:`sample`.

    Attributes:
        tokens: of all samples, on the CPU.
        labels: class of each, an index into ``config.classes``; 0 where there are none.
    """

    tokens: TokenSequence
    labels: list[int]


@torch.no_grad()
def sample(
    generator: Generator,
    count: int,
    *,
    of: str | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    steps: int = STEPS,
    in_flight: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Samples:
    """Sample new token sequences, each of a length of its own.

    A sample depends on the seed and its number, not on those beside it, up to rounding in the generator.

    Args:
        count: samples, 1 to 2^20.
        of: a class; None: classes as often as the training data have them.
        seed: 0 to 2^63 - 1.
        temperature, top_k, top_p: see :class:`alit.generation.drawing.Sharpness`.
        steps: in which a generator that is not causal fills in masked tokens.
        in_flight: samples computed together; bounds memory.
        on_progress: called with the number of samples that are done.

    Raises:
        ValueError: an argument out of range; a class that the generator does not know; an untrained generator whose
            classes or lengths are to be drawn.
    """
    config = generator.config
    check_number("count", count, int, 1, MOST)
    check_number("seed", seed, int, 0, 2**63 - 1)
    check_number("steps", steps, int, 1, 2**16)
    check_number("in_flight", in_flight, int, 1, MOST)
    sharpness = Sharpness(temperature, top_k, top_p)
    if of is not None and not config.classes:
        raise ValueError(f"class: expected none, the generator has no classes, got {shown(of)}")
    frequencies = generator.lengths.sum(1).double().cpu()
    if of is not None:
        check_choice("class", of, config.classes)
        frequencies = torch.eye(len(config.classes), dtype=torch.float64)[config.classes.index(of)]
    elif not config.classes:
        frequencies = torch.ones(1, dtype=torch.float64)
    trained = bool(generator.lengths.sum() > 0)
    if not trained and not (config.causal and frequencies.sum() > 0):
        raise ValueError("generator: expected a trained one; it knows no lengths and no classes")
    wanted = []
    for number in range(count):
        random = chance(seed, number)
        wanted.append((int(frequencies.multinomial(1, generator=random)), random))
    if config.causal:
        found = autoregressive(generator, wanted, sharpness, in_flight, on_progress)
    else:
        found = masked(generator, wanted, sharpness, steps, in_flight, on_progress)
    lengths = torch.tensor([len(x) for x in found])
    return Samples(TokenSequence(lengths, torch.cat(found)), [label for label, _ in wanted])
