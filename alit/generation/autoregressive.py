"""Autoregressive sampling of many sequences at once: one that has ended leaves, and another takes its place.

Each place of the cache holds the keys and values of one sequence, as many rows as the longest has. Nothing in it moves:
a query's stop says how many rows of its place count, and attention reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alit_kernels import cumulative_offsets, varlen_attention

from .drawing import Sharpness, draw
from .model import Attend, Generator

#: Class and random generator of a sample.
Wanted = tuple[int, torch.Generator]


class Cache:
    """Cache of the keys and values of ``places`` sequences."""

    def __init__(self, generator: Generator, places: int) -> None:
        config, like = generator.config, generator.embedding.weight
        self.capacity = config.max_tokens
        shape = places * self.capacity, config.heads, config.width // config.heads
        self.keys = [like.new_zeros(shape) for _ in range(config.layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.layers)]
        self.offsets = self.capacity * torch.arange(
            places + 1, dtype=torch.int32, device=like.device
        )

    def attend(self, place_R: Tensor, position_R: Tensor) -> Attend:
        """Attention for one new row of each sequence, whose keys and values it adds to those of its place.

        Args:
            place_R: place of each row's sequence, rising.
            position_R: position of the row in its sequence.
        """
        row_R, stops = place_R * self.capacity + position_R, (position_R + 1).int()
        running = torch.zeros(len(self.offsets) - 1, dtype=torch.int32, device=place_R.device)
        offsets = cumulative_offsets(running.index_fill(0, place_R, 1))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(0, row_R, k)
            values.index_copy_(0, row_R, v)
            out = varlen_attention(
                *(q, keys, values, offsets),
                key_offsets=self.offsets,
                max_length=1,
                max_key_length=self.capacity,
                key_stop=stops,
            )
            assert isinstance(out, Tensor)
            return out

        return attend


def next_token(
    generator: Generator, x_RC: Tensor, position_R: Tensor, uniform_R: Tensor, sharpness: Sharpness
) -> Tensor:
    """Draw tokens (R,) at these positions; K is the end, which no sequence begins with."""
    end = generator.config.codebook_size
    logits_RK = x_RC.new_empty(len(x_RC), end + 1)
    for rows, logits in generator.scored(x_RC, position_R):
        logits_RK[rows] = logits
    logits_RK[:, end].masked_fill_(position_R == 0, -torch.inf)
    return draw(logits_RK, uniform_R, sharpness)[0]


def autoregressive(
    generator: Generator,
    wanted: Sequence[Wanted],
    sharpness: Sharpness,
    in_flight: int,
    on_progress: Callable[[int], None],
) -> list[Tensor]:
    """Sampled tokens of each sequence, (length,) int64 on the CPU.

    Args:
        in_flight: sequences that are computed together.
        on_progress: called with the number of samples that have ended.
    """
    config, device = generator.config, generator.embedding.weight.device
    end, longest = config.codebook_size, config.max_tokens
    places = min(in_flight, len(wanted))
    cache = Cache(generator, places)
    # For each place: the sample it holds (-1: none), its tokens, their number, its random numbers, its newest row.
    number_S = [-1] * places
    token_SN = torch.zeros(places, longest, dtype=torch.int64, device=device)
    length_S = torch.zeros(places, dtype=torch.int64, device=device)
    uniform_SN = torch.zeros(places, longest, device=device)
    slot_S = torch.zeros(places, dtype=torch.int64, device=device)
    found: list[Tensor] = [torch.empty(0)] * len(wanted)
    begun = done = 0

    def begin(place: int) -> None:
        """Start the next sample at a place, if there is one."""
        nonlocal begun
        number_S[place] = -1
        if begun < len(wanted):
            label, chance = wanted[begun]
            number_S[place], length_S[place] = begun, 0
            uniform_SN[place] = torch.rand(longest, generator=chance).to(device)
            slot_S[place] = generator.class_slot(torch.tensor(label))
            begun += 1

    for place in range(places):
        begin(place)
    while running := [place for place in range(places) if number_S[place] >= 0]:
        place_R = torch.tensor(running, device=device)
        position_R = length_S[place_R]
        attend = cache.attend(place_R, position_R)
        x_RC = generator(slot_S[place_R], position_R, None, attend)
        token_R = next_token(
            generator, x_RC, position_R, uniform_SN[place_R, position_R], sharpness
        )
        token_SN[place_R, position_R] = token_R
        slot_S[place_R] = generator.code_slot(token_R, position_R)
        length_S[place_R] += token_R != end
        ended_R = (token_R == end) | (position_R == longest - 1)
        for place in place_R[ended_R].tolist():
            found[number_S[place]] = token_SN[place, : length_S[place]].clone().cpu()
            begin(place)
            done += 1
        on_progress(done)
    return found
