"""Shards: tar files of images, read as streams that stop and go on, by as many readers as there are then.

The order of an epoch's shards depends on seed and epoch alone, that within a shard on the shard too: runs of
``shuffle_buffer`` images are permuted. Readers (the workers of all processes) take shards in turn. So a few numbers
say what a reader has delivered of an epoch, and what all of them left is divided among other readers.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checks import CheckpointError
from .image_data import Batch, Preparation, Share, become_worker
from .log import reason
from .tars import Member, NoImages, check_name, expand, members

#: Fewest shards that a reader tries in a row, without an image that can be read, before it gives up.
TRIED = 16


def is_shards(data: str) -> bool:
    return data.lower().endswith(".tar")


class Rest(NamedTuple):
    """Rest of a shard: images from ``first`` on, without the first ``taken`` of the first permuted run."""

    shard: int
    first: int = 0
    taken: int = 0


class Position(NamedTuple):
    """Position of a reader: in its shard number ``slot`` of an epoch; ``first`` and ``taken`` as in :class:`Rest`."""

    epoch: int = 0
    slot: int = 0
    first: int = 0
    taken: int = 0


def left(rests: Sequence[Rest], positions: Sequence[Position], epoch: int) -> list[Rest]:
    """Rests of shards that readers at these positions, which took ``rests`` in turn, left of an epoch."""
    found = []
    for number, rest in enumerate(rests):
        at = positions[number % len(positions)]
        slot = number // len(positions)
        if (epoch, slot) > (at.epoch, at.slot):
            found.append(rest)
        elif (epoch, slot) == (at.epoch, at.slot):
            found.append(Rest(rest.shard, *max(rest[1:], at[2:])))
    return found


class ShardStream(IterableDataset[Batch]):
    """Stream of one process's batches.

    Args:
        pattern: name of a tar file, or of several with braces.
        buffer: images that are permuted together.
        state: of each process that ran before, the state that came with its last batch; ``None`` from the start. With
            as many processes and workers the stream goes on as if it had not stopped, with others each image that an
            epoch still had comes once.
        addresses: names may be http and https addresses.

    Raises:
        OSError: a shard that is not there.
        ValueError: fewer shards than readers; an address that is not allowed.
        alit.CheckpointError: a state of another kind, or of other shards, seed or buffer.
    """

    def __init__(
        self,
        pattern: str,
        share: Share,
        prepare: Preparation,
        *,
        seed: int,
        buffer: int,
        workers: int,
        state: list[Any] | None,
        addresses: bool = False,
    ) -> None:
        self.names = expand(pattern)
        for name in self.names:
            check_name(name, addresses)
        self.workers = max(workers, 1)
        self.readers = share.processes * self.workers
        if len(self.names) < self.readers:
            raise ValueError(
                f"data: expected a shard for each of {share.processes} x {self.workers} readers, got {len(self.names)};"
                " take fewer workers"
            )
        self.share, self.prepare = share, prepare
        self.seed, self.buffer, self.addresses = seed, buffer, addresses
        self.facts = {"shards": len(self.names), "seed": seed, "shuffle_buffer": buffer}
        self.positions, self.next = [Position()] * self.workers, 0
        self.before: list[list[Position]] = []
        if state is not None:
            self._go_on(state)

    def _go_on(self, states: list[Any]) -> None:
        """Take the readers' positions, or divide what they left among the present readers."""
        try:
            positions = [_positions(x["positions"]) for x in states]
            before = [_positions(x) for x in states[0]["before"]]
            following = int(states[0]["next"]) % len(positions[0])
            facts = [{name: x[name] for name in self.facts} for x in states]
        except (TypeError, LookupError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"data: the checkpoint's state of the shards is not understood ({error!r})"
            ) from error
        for name, value in self.facts.items():
            if any(x[name] != value for x in facts):
                raise CheckpointError(
                    f"data: the run began with {name} {facts[0][name]!r}, got {value}; what is left of an epoch depends"
                    " on it"
                )
        if [len(x) for x in positions] == [self.workers] * self.share.processes:
            self.positions, self.before = positions[self.share.rank], before
            self.next = following
            return
        together = [position for own in positions for position in own]
        epoch = min(x.epoch for x in together)
        self.positions = [Position(epoch)] * self.workers
        self.before = [x for x in (*before, together) if max(x).epoch >= epoch]

    def state(self, positions: Sequence[Position], following: int) -> dict[str, Any]:
        """State of the stream at these positions, as JSON has it."""
        own = [list(x) for x in positions]
        before = [[list(x) for x in y] for y in self.before] if self.share.rank == 0 else []
        return {**self.facts, "next": following, "positions": own, "before": before}

    def _lane(self, epoch: int, worker: int) -> list[Rest]:
        """Rests of shards that one reader takes in an epoch."""
        order = np.random.default_rng((self.seed, 3, epoch)).permutation(len(self.names))
        rests = [Rest(int(shard)) for shard in order]
        for positions in self.before:
            rests = left(rests, positions, epoch)
        return rests[self.share.rank * self.workers + worker :: self.readers]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        # The loader takes batches of its workers in turn and begins with the first.
        worker = ((info.id if info else 0) + self.next) % self.workers
        images: list[Tensor] = []
        skipped: list[str] = []
        tried = 0
        try:
            for at, member, shard, index in self._members(worker, skipped):
                tried += at.taken == 0
                if member is not None:
                    place = (self.seed, 2, at.epoch, shard, index)
                    image = self._decoded(member, shard, np.random.default_rng(place), skipped)
                    if image is not None:
                        images.append(image)
                        tried = 0
                if len(images) == self.share.size:
                    state = {"worker": worker, "at": list(at)}
                    yield Batch(torch.stack(images), list(skipped), state)
                    images.clear()
                    skipped.clear()
                elif tried > max(TRIED, len(self.names)):
                    yield Batch(torch.empty(0), skipped)
                    return
        except NoImages as error:
            yield Batch(torch.empty(0), skipped, {"error": str(error)})

    def _members(
        self, worker: int, skipped: list[str]
    ) -> Iterator[tuple[Position, Member | None, int, int]]:
        """Yield, epoch after epoch, the position after an image, the image, its shard, its number there.

        Before the images of a shard comes its beginning, without an image.
        """
        start = self.positions[worker]
        for epoch in itertools.count(start.epoch):
            for slot, (shard, *rest) in enumerate(self._lane(epoch, worker)):
                if (epoch, slot) < start[:2]:
                    continue
                at = [*start[2:]] if (epoch, slot) == start[:2] else [0, 0]
                first, taken = max(rest, at)
                yield Position(epoch, slot, first), None, shard, first
                found = members(self.names[shard], first, skipped, addresses=self.addresses)
                while run := list(itertools.islice(found, self.buffer)):
                    chance = np.random.default_rng((self.seed, 4, epoch, shard, first))
                    for done, index in enumerate(chance.permutation(len(run)), 1):
                        if done > taken:
                            at_now = Position(epoch, slot, first, done)
                            yield at_now, run[index], shard, first + int(index)
                    first, taken = first + self.buffer, 0

    def _decoded(
        self, member: Member, shard: int, chance: np.random.Generator, skipped: list[str]
    ) -> Tensor | None:
        file = io.BytesIO(member.content)
        try:
            return self.prepare.load(file, chance)
        except OSError as error:
            why = reason(error).replace(repr(file), "it")
            skipped.append(f"{self.names[shard]}: {member.name}: {why}")
            return None


def _positions(values: Any) -> list[Position]:
    found = [Position(*value) for value in values if len(value) == len(Position._fields)]
    numbers = [x for position in found for x in position]
    if not len(found) == len(values) > 0 or not all(
        type(x) is int and 0 <= x < 2**53 for x in numbers
    ):
        raise ValueError("expected positions of four numbers")
    return found


class ShardBatches(Iterator[Batch]):
    """Iterator over the stream's batches, each with the state of the whole process after it, which ``state`` holds too.

    Raises:
        ValueError: a shard without images.
    """

    def __init__(self, stream: ShardStream, *, workers: int, pin: bool) -> None:
        self.stream = stream
        self.positions = list(stream.positions)
        self.state = stream.state(self.positions, stream.next)
        loader: DataLoader[Batch] = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=become_worker,
            pin_memory=pin,
        )
        self.batches = iter(loader)

    def __next__(self) -> Batch:
        batch = next(self.batches)
        if batch.state is None:
            return batch
        if "error" in batch.state:
            raise ValueError(f"data: {batch.state['error']}")
        worker = batch.state["worker"]
        self.positions[worker] = Position(*batch.state["at"])
        following = (worker + 1) % self.stream.workers
        self.state = self.stream.state(self.positions, following)
        return batch._replace(state=self.state)
