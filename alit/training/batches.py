"""Batches of a run, from the data that its configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..generation import Generator
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .image_data import Batch, ImageFolder, ImageTensor, Preparation, Share, shuffled_batches
from .length_stage import held_out
from .processes import Processes
from .shards import ShardBatches, ShardStream, is_shards
from .token_files import TokenRows


def batches(
    config: TrainingConfig,
    images: Tensor | None,
    model: AdaptiveTokenizer | Generator,
    own: Processes,
    step: int,
    state: list[Any] | None,
    *,
    addresses: bool,
) -> tuple[Iterator[Batch], list[str]]:
    """Batches of this process, and the files of a folder that are left out.

    Args:
        images: in place of ``config.data``.
        model: what learns; images get the size of its own.
        step: step at which the run goes on; ``state``: position of each process's stream of shards.
        addresses: shards may lie at http and https addresses.

    Raises:
        OSError, ValueError: data that are missing or do not fit.
    """
    share = Share(config.batch_size, config.accumulate, own.rank, own.count)
    pin = own.device.type == "cuda"
    data: ImageFolder | ImageTensor | TokenRows
    prepared = {"size": model.config.image_size, **preparation(config)}
    if isinstance(model, Generator):
        if images is not None:
            raise ValueError("images: expected None in stage generator, which learns from files")
        data = TokenRows.read(config.data, config.labels, model.config)
    elif images is not None:
        data = ImageTensor(images.cpu(), flip=config.flip)
    elif config.data is None:
        raise ValueError("data: expected a folder of images or shards, got none")
    elif is_shards(config.data):
        stream = ShardStream(
            config.data,
            share,
            Preparation(**prepared),
            seed=config.seed,
            buffer=config.shuffle_buffer,
            workers=config.workers,
            state=state,
            addresses=addresses,
        )
        return ShardBatches(stream, workers=config.workers, pin=pin), []
    else:
        data = ImageFolder(config.data, **prepared)
    shuffled = shuffled_batches(
        data,
        share,
        seed=config.seed,
        workers=config.workers if isinstance(data, ImageFolder) else 0,
        steps=(step, config.steps),
        pin=pin,
        once=held_out(config) if config.stage == "length" else 0,
    )
    return shuffled, list(data.left_out)


def preparation(config: TrainingConfig) -> dict[str, Any]:
    """Options of :class:`alit.training.image_data.Preparation` except the size."""
    names = ("crop", "flip", "convert_profiles", "max_megapixels")
    return {name: getattr(config, name) for name in names}
