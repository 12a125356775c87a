"""Inputs of an analysis: images of a folder, people's scores of them, people's segments in them."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..console import printable, reported
from ..folders import in_folder
from ..images import MAX_MEGAPIXELS, load, to_levels, upright

#: Fewest images that a correlation needs.
FEWEST = 3
#: Most names in a message.
NAMED = 5


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of a model's size, all in memory.

    Attributes:
        folder: where they lie.
        names: their files, relative to the folder.
        levels: (N, 3, height, width) uint8.
        all_names: these and those of files that were not read: beyond a limit, or unreadable.
        skipped: a line for each file that was skipped.
    """

    folder: Path
    names: list[str]
    levels: Tensor
    all_names: list[str]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.names)


def batches(levels: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches (B, 3, height, width) float32 in [0, 1] of at most ``size`` images (N, 3, height, width) uint8."""
    for part in levels.split(size):
        yield part.float() / 255


def read_images(
    argument: str,
    folder: Path,
    size: tuple[int, int],
    *,
    limit: int | None = None,
    recursive: bool = True,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> ImageSet:
    """Read the images of a folder by name, the first ``limit``; those that cannot be read are skipped and listed.

    Raises:
        OSError: as :func:`alit.folders.in_folder`.
        ValueError: fewer than 3 that can be read; ``argument`` is named.
    """
    listing = in_folder(folder, recursive=recursive)
    every = [_name(file, folder) for file in listing.images]
    listing.images = listing.images[:limit]
    names, levels = [], []
    found = listing.loaded(lambda x: load(x, size, max_megapixels=max_megapixels))
    for file, pixels in reported(found, f"reading {argument}", len(listing.images)):
        names.append(_name(file, folder))
        levels.append(to_levels(pixels))
    skipped = [*listing.left_out, *listing.unreadable]
    if len(names) < FEWEST:
        reasons = "".join(f"\n  {line}" for line in skipped)
        raise ValueError(
            f"{argument}: expected at least {FEWEST} images that can be read in {printable(folder)}, "
            f"got {len(names)}{reasons}"
        )
    return ImageSet(folder, names, torch.stack(levels), every, skipped)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def read_scores(file: Path, data: ImageSet) -> list[float]:
    """Score of each image, from a CSV file with columns ``file`` and ``complexity`` (higher is busier).

    Raises:
        OSError: the file cannot be read.
        ValueError: no such columns, a score that is no finite number, a name twice, a score without an image or an
            image without a score; ``scores`` and what is wrong are named.
    """
    found: dict[str, float] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            if not {"file", "complexity"} <= set(reader.fieldnames or ()):
                got = ", ".join(reader.fieldnames or ()) or "none"
                raise ValueError(f"scores: expected columns file and complexity, got {got}")
            for row in reader:
                name = row["file"] or ""
                if name in found:
                    raise ValueError(f"scores: expected each image once, got {name} twice")
                found[name] = _number(row["complexity"], name)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"scores: {file} is no CSV file ({error})") from error
    _check_pairs("scores", "a score", found, data)
    return [found[name] for name in data.names]


def _number(text: str | None, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"scores: expected a number for {name}, got {text!r}")
    return value


def _check_pairs(argument: str, what: str, there: Collection[str], data: ImageSet) -> None:
    """Check that each image has an entry in ``there``, and each entry an image; raises ``ValueError``."""
    for missing, kind in (
        ([x for x in data.names if x not in there], f"{what} for each image, none for"),
        (
            sorted(set(there) - set(data.all_names)),
            f"an image for each of {argument}, none for",
        ),
    ):
        if missing:
            beyond = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise ValueError(f"{argument}: expected {kind} {', '.join(missing[:NAMED])}{beyond}")


def read_segments(folder: Path, data: ImageSet, size: tuple[int, int]) -> list[Tensor]:
    """People's segments of each image as labels (height, width) int64 from 0, cropped and resized as the image.

    Segments of ``NAME.jpg`` are in ``NAME.png``, of the same size: the pixels of one color are a segment.

    Raises:
        OSError: not a folder, or a file that cannot be read.
        ValueError: an image without segments or segments without an image, another size than the image's, more
            than 8 bits a channel; ``segments`` and the file are named.
    """
    there = {_name(x, folder)[: -len(x.suffix)]: x for x in in_folder(folder).images}
    of = {name: str(Path(name).with_suffix("").as_posix()) for name in data.all_names}
    named = {name: there[stem] for name, stem in of.items() if stem in there}
    extra = {x.name: x for stem, x in there.items() if stem not in of.values()}
    _check_pairs("segments", "segments", {**named, **extra}, data)
    return [_labels(named[name], data.folder / name, size) for name in data.names]


def _labels(file: Path, image_file: Path, size: tuple[int, int]) -> Tensor:
    with Image.open(file) as header:
        if header.mode.startswith(("I", "F")):
            raise ValueError(
                f"segments: expected 8 bits a channel, got mode {header.mode} in {printable(file)}"
            )
    image = upright(file, convert_profiles=False)
    expected = upright(image_file).size
    if image.size != expected:
        raise ValueError(
            f"segments: expected {expected[0]}x{expected[1]} pixels, as its image has, "
            f"got {image.size[0]}x{image.size[1]} in {printable(file)}"
        )
    fitted = np.array(ImageOps.fit(image, size[::-1], Image.Resampling.NEAREST), dtype=np.int64)
    colors = torch.from_numpy(fitted @ np.array([65536, 256, 1]))
    return colors.unique(return_inverse=True)[1]


def spaced(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` evenly spaced indices below ``count``: examples that nobody picked by hand."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
