"""Training images: folders and tensors, in an order and with crops that depend on seed and position alone.

Position p counts the images of a run: a run that stops and goes on at position p sees what it would have seen.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..folders import in_folder
from ..images import MAX_MEGAPIXELS, upright
from .log import reason
from .processes import keep_memory


class Batch(NamedTuple):
    """Microbatch: one part of a step's batch.

    Attributes:
        images: (B, 3, height, width), uint8 or float in [0, 1]; empty where no image can be read.
        unreadable: names of files that could not be read on the way, each with its reason.
        state: position of a stream after them; None where the step says it all.
    """

    images: Tensor
    unreadable: list[str]
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Share:
    """One process's part of each step's batch.

    Attributes:
        batch_size: images of a step, over all processes.
        accumulate: parts that a process computes one after another.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        parts = self.accumulate * self.processes
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size: expected a multiple of accumulate x processes = {parts}, got {self.batch_size}"
            )

    @property
    def size(self) -> int:
        """Images that one process computes at a time."""
        return self.batch_size // (self.accumulate * self.processes)

    def positions(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """Yield the positions of each part of this process; which process computes what changes no step's batch."""
        for step in range(first_step, last_step):
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.processes + self.rank) * self.size
                yield list(range(start, start + self.size))


@dataclass(frozen=True)
class Preparation:
    """Decoding and augmentation of an image.

    Attributes:
        size: height and width of the result.
        crop, flip, convert_profiles, max_megapixels: as in :class:`alit.training.TrainingConfig`.
    """

    size: tuple[int, int]
    crop: float
    flip: bool
    convert_profiles: bool = True
    max_megapixels: float = MAX_MEGAPIXELS

    def load(self, source: Path | BinaryIO, random: np.random.Generator) -> Tensor:
        """Load an image, augmented: (3, height, width) uint8; raises ``OSError`` where it cannot be read."""
        pil_image = upright(
            source,
            convert_profiles=self.convert_profiles,
            max_megapixels=self.max_megapixels,
        )
        return self.augmented(pil_image, random)

    def augmented(self, pil_image: Image.Image, random: np.random.Generator) -> Tensor:
        """Random resized crop and flip of an RGB image: (3, height, width) uint8.

        The crop of torchvision's RandomResizedCrop, a share of the area in [crop, 1], of an aspect of 3/4 to 4/3 times
        the target's; ``crop`` 1 takes the largest centered box of the target's aspect.
        """
        height, width = self.size
        if self.crop < 1:
            box = _random_box(pil_image.size, self.crop, width / height, random)
            pil_image = pil_image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        else:
            pil_image = ImageOps.fit(pil_image, (width, height), Image.Resampling.BICUBIC)
        if self.flip and random.random() < 0.5:
            pil_image = ImageOps.mirror(pil_image)
        return torch.from_numpy(np.array(pil_image)).permute(2, 0, 1).contiguous()


class ImageFolder:
    """The images of a folder and the folders in it, by name; the options are those of :class:`Preparation`.

    Attributes:
        left_out: a line for every file that a person would call an image, but that is not read.

    Raises:
        OSError: not a folder, one that cannot be read, or one without images.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], **options: Any) -> None:
        listing = in_folder(Path(folder))
        self.files, self.left_out = listing.images, listing.left_out
        self.prepare = Preparation(size, **options)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def load(self, index: int, random: np.random.Generator) -> Tensor:
        """Load the image with this number, as :meth:`Preparation.load`."""
        return self.prepare.load(self.files[index], random)


class ImageTensor:
    """Images in memory, (N, 3, height, width) in [0, 1], flipped but not cropped."""

    left_out: Sequence[str] = ()

    def __init__(self, images: Tensor, *, flip: bool) -> None:
        self.images, self.flip = images, flip

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, random: np.random.Generator) -> Tensor:
        image = self.images[index]
        return image.flip(2) if self.flip and random.random() < 0.5 else image


def _random_box(
    size: tuple[int, int], crop: float, target: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Random crop box: left, top, right and bottom; ``target`` is the aspect around which its own is drawn."""
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(crop, 1)
        aspect = target * math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(random.integers(0, width - across + 1))
            top = int(random.integers(0, height - down + 1))
            return left, top, left + across, top + down
    # An image of quite another aspect: its center, at the nearest aspect allowed.
    across = max(1, min(width, round(height * target * 4 / 3)))
    down = max(1, min(height, round(width / target * 4 / 3)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


class ImageData(Protocol):
    """Protocol of numbered samples, such as a folder of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of a sample, for messages."""

    def load(self, index: int, random: np.random.Generator) -> Tensor:
        """Load a sample; raises ``OSError`` where it cannot be read."""


class Shuffled(Dataset[tuple[Tensor, list[str]]]):
    """Dataset of images by position: each epoch has all of them in an order of its own; those after the first leave
    out the ``once`` images with which the first began.

    An image that cannot be read is replaced by the next one that can, or by an empty tensor where none can.
    """

    def __init__(self, images: ImageData, seed: int, once: int = 0) -> None:
        self.images, self.seed, self.once = images, seed, once
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._broken: set[int] = set()

    def __getitem__(self, position: int) -> tuple[Tensor, list[str]]:
        first, count = len(self.images), len(self.images) - self.once
        epoch, place = (0, position) if position < first else divmod(position - self.once, count)
        if epoch != self._epoch:
            self._order = self._permuted(0, np.arange(first))
            if epoch:
                self._order = self._permuted(epoch, np.sort(self._order[self.once :]))
            self._epoch = epoch
        count = len(self._order)
        unreadable: list[str] = []
        for attempt in range(count):
            index = int(self._order[(place + attempt) % count])
            if index in self._broken:
                continue
            try:
                random = np.random.default_rng((self.seed, 1, position))
                return self.images.load(index, random), unreadable
            except OSError as error:
                self._broken.add(index)
                unreadable.append(f"{self.images.name(index)}: {reason(error)}")
        # An exception would lose its class on the way out of a worker.
        return torch.empty(0), unreadable

    def _permuted(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(numbers)


def shuffled_batches(
    images: ImageData,
    share: Share,
    *,
    seed: int,
    workers: int,
    steps: tuple[int, int],
    pin: bool,
    once: int = 0,
) -> Iterator[Batch]:
    """Iterator over this process's batches for the steps from the first to before the last; see :class:`Shuffled`.

    Raises:
        ValueError: fewer images than a batch, or no more than ``once``.
    """
    check_enough(images, share.batch_size, once)
    loader: DataLoader[Any] = DataLoader(
        Shuffled(images, seed, once),
        batch_sampler=share.positions(*steps),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=become_worker,
        pin_memory=pin,
    )
    return iter(loader)


def check_enough(images: ImageData, batch_size: int, once: int = 0) -> None:
    """Check that there is a batch of images, and more than the ``once`` that come once; raises ``ValueError``."""
    if len(images) < batch_size:
        raise ValueError(
            f"data: expected at least a batch of {batch_size} images, got {len(images)}"
        )
    if len(images) <= once:
        raise ValueError(
            f"data: expected more images than the {once} that are held out, got {len(images)}"
        )


def collate(samples: Sequence[tuple[Tensor, list[str]]]) -> Batch:
    images = torch.stack([image for image, _ in samples])
    return Batch(images, [name for _, names in samples for name in names])


def become_worker(worker: int) -> None:
    """Worker init: ignore SIGINT, defer SIGTERM, and do not keep freed memory.

    Signals reach every process of a group; the training process acts on them, and needs its workers until then. A
    second SIGTERM is for the worker itself.
    """
    keep_memory(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
