"""The batches of a run, from what its configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .config import TrainingConfig
from .pictures import Batch, ImageFolder, ImageTensor, Preparation, Share, shuffled_batches
from .processes import Processes
from .shards import ShardBatches, ShardStream, is_shards


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
    prepared = {"size": size, **preparation(config)}
    if images is None and is_shards(str(config.data)):
        stream = ShardStream(
            str(config.data),
            share,
            Preparation(**prepared),
            seed=config.seed,
            buffer=config.shuffle_buffer,
            workers=config.workers,
            state=state,
            addresses=addresses,
        )
        return ShardBatches(stream, workers=config.workers, pin=pin), []
    pictures: ImageFolder | ImageTensor
    if images is None:
        pictures = ImageFolder(str(config.data), **prepared)
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
    return shuffled, list(pictures.left_out)


def preparation(config: TrainingConfig) -> dict[str, Any]:
    """Options of :class:`alit.training.pictures.Preparation` but the size."""
    names = ("crop", "flip", "convert_profiles", "max_megapixels")
    return {name: getattr(config, name) for name in names}
