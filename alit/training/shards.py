"""WebDataset shards: tar files of pictures, read as streams that stop and go on at the same picture."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..images import MAX_MEGAPIXELS, upright
from .pictures import Batch, Share, augmented, become_worker

SUFFIXES = ("jpg", "jpeg", "png", "webp")


def is_shards(data: str) -> bool:
    return data.endswith(".tar")


class ShardStream(IterableDataset[Batch]):
    """Batches of one process. Shards go to processes and workers in turn, in an order of their own each epoch.

    Args:
        urls: names of tar files, braces expanded.
        state: by worker, epoch and pictures taken from it so far; ``next`` is the worker whose batch comes next.

    Raises:
        OSError: a local shard that is not there.
        ValueError: fewer shards than readers.
    """

    def __init__(
        self,
        pattern: str,
        share: Share,
        *,
        size: tuple[int, int],
        crop: float,
        flip: bool,
        seed: int,
        buffer: int,
        workers: int,
        state: dict[str, Any] | None,
        convert_profiles: bool = True,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError as error:
            raise ValueError("data: shards need webdataset: pip install 'alit[train]'") from error
        self.readers = max(workers, 1)
        urls = expand_urls(pattern)
        for url in urls:
            if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file():
                raise OSError(f"{url}: no such shard")
        if len(urls) < share.processes * self.readers:
            raise ValueError(
                f"data: expected a shard for each of {share.processes} x {self.readers} readers, got {len(urls)};"
                " take fewer workers"
            )
        self.urls = urls[share.rank :: share.processes]
        self.share, self.size, self.crop, self.flip = share, size, crop, flip
        self.seed, self.buffer = seed, buffer
        self.reading: Any = {"convert_profiles": convert_profiles, "max_megapixels": max_megapixels}
        self.state = state or {"next": 0, "workers": [[0, 0] for _ in range(self.readers)]}
        if len(self.state["workers"]) != self.readers:
            raise ValueError(
                f"workers: expected {len(self.state['workers'])}, as the run began with, got {workers}"
            )

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        # The loader takes batches of its workers in turn and begins with the first.
        reader = ((info.id if info else 0) + self.state["next"]) % self.readers
        start, taken = self.state["workers"][reader]
        images: list[Tensor] = []
        unreadable: list[str] = []
        for epoch in itertools.count(start):
            readable, first = False, taken
            stream = self._samples(reader, epoch, unreadable)
            for sample in itertools.islice(stream, taken, None):
                taken += 1
                place = (self.seed, 2, self.share.rank, reader, epoch, taken)
                image = self._decoded(sample, np.random.default_rng(place), unreadable)
                if image is None:
                    continue
                readable = True
                images.append(image)
                if len(images) == self.share.size:
                    state = {"reader": reader, "epoch": epoch, "taken": taken}
                    yield Batch(torch.stack(images), unreadable, state)
                    images, unreadable = [], []
            if not readable and first == 0:
                yield Batch(torch.empty(0), [*unreadable, *self._own(reader)], None)
                return
            taken = 0

    def _own(self, reader: int) -> list[str]:
        return self.urls[reader :: self.readers]

    def _samples(self, reader: int, epoch: int, unreadable: list[str]) -> Iterator[dict[str, Any]]:
        import webdataset as wds

        chance = random.Random(f"{self.seed} {self.share.rank} {reader} {epoch}")
        urls = chance.sample(self._own(reader), len(self._own(reader)))

        def damaged(error: Exception) -> bool:
            unreadable.append(str(error))
            return True

        return iter(
            wds.DataPipeline(
                wds.SimpleShardList(urls),
                wds.tarfile_to_samples(handler=damaged),
                wds.shuffle(self.buffer, initial=self.buffer, rng=chance),
            )
        )

    def _decoded(
        self, sample: dict[str, Any], chance: np.random.Generator, unreadable: list[str]
    ) -> Tensor | None:
        suffix = next((name for name in SUFFIXES if name in sample), None)
        name = f"{sample.get('__url__')}: {sample.get('__key__')}"
        try:
            if suffix is None:
                raise OSError(f"no picture ({', '.join(SUFFIXES)})")
            picture = upright(io.BytesIO(sample[suffix]), **self.reading)
            return augmented(picture, self.size, self.crop, self.flip, chance)
        except OSError:
            unreadable.append(name)
            return None


class ShardBatches(Iterator[Batch]):
    """The stream's batches, each with the state of the whole stream after it."""

    def __init__(self, stream: ShardStream, *, workers: int, pin: bool) -> None:
        self.stream = stream
        self.state = stream.state
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
        positions = [list(x) for x in self.state["workers"]]
        positions[batch.state["reader"]] = [batch.state["epoch"], batch.state["taken"]]
        following = (batch.state["reader"] + 1) % self.stream.readers
        self.state = {"next": following, "workers": positions}
        return batch._replace(state=self.state)
