"""The batches of a run, from what its configuration names, and what was skipped on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from .config import TrainingConfig
from .pictures import Batch, ImageFolder, ImageTensor, Pictures, Share, shuffled_batches
from .processes import Processes
from .shards import ShardBatches, ShardStream, is_shards

#: Names of skipped files that are kept.
MOST_NAMES = 10_000


class Skipped:
    """What was skipped, each thing once, in the order in which it was first seen."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names: dict[str, None] = {}
        self.add(names)

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self._names) < MOST_NAMES:
                self._names.setdefault(name)

    def list(self) -> list[str]:
        """At most 10,000 names; then a last one says that there were more."""
        more = [f"and perhaps more than these {MOST_NAMES}"]
        return list(self._names) + (more if len(self._names) == MOST_NAMES else [])


def batches(
    config: TrainingConfig,
    images: Tensor | None,
    size: tuple[int, int],
    own: Processes,
    step: int,
    state: list[Any] | None,
    *,
    addresses: bool,
) -> tuple[Iterator[Batch], list[str]]:
    """Batches of this process, and the files of a folder that are left out.

    Args:
        images: in place of ``config.data``.
        size: height and width of what the model sees.
        step: where the run goes on, ``state``: where each process's stream of shards stood.
        addresses: shards may lie at http and https addresses.

    Raises:
        OSError, ValueError: data that are not there or do not fit.
    """
    share = Share(config.batch_size, config.accumulate, own.rank, own.count)
    pin = own.device.type == "cuda"
    if images is None and config.data is None:
        raise ValueError("data: expected a folder of pictures or shards, got none")
    names = ("crop", "flip", "convert_profiles", "max_megapixels")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    if images is None and is_shards(str(config.data)):
        stream = ShardStream(
            str(config.data),
            share,
            size=size,
            seed=config.seed,
            buffer=config.shuffle_buffer,
            workers=config.workers,
            state=state,
            addresses=addresses,
            **options,
        )
        return ShardBatches(stream, workers=config.workers, pin=pin), []
    pictures: Pictures
    left_out: list[str] = []
    if images is None:
        pictures = folder = ImageFolder(str(config.data), size, **options)
        left_out = folder.left_out
    else:
        pictures = ImageTensor(images.cpu(), flip=config.flip)
    shuffled = shuffled_batches(
        pictures,
        share,
        seed=config.seed,
        workers=0 if images is not None else config.workers,
        steps=(step, config.steps),
        pin=pin,
    )
    return shuffled, left_out
