"""Labeled images: a folder with a subfolder of images for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..console import counted, printable
from ..folders import Listing, find


class Labeled(NamedTuple):
    """Images of several classes.

    Attributes:
        classes: names of the folders, sorted.
        listing: their images, class by class; folders within those of classes count with them.
        labels: the class of each image, from 0.
    """

    classes: list[str]
    listing: Listing
    labels: dict[Path, int]


def labeled(folder: Path, name: str = "data") -> Labeled:
    """List the images of a folder by class; those that lie beside the folders of classes do not count.

    Args:
        name: the argument's name in messages.

    Raises:
        OSError: no folder, or one that cannot be read; a class without images.
        ValueError: not at least two classes.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)}: not a folder")
    classes = sorted(x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(
            f"{name}: expected a folder of images for each of at least two classes, got "
            f"{counted(len(classes), 'folder')} in {printable(folder)}"
        )
    listing = Listing()
    labels: dict[Path, int] = {}
    for label, each in enumerate(classes):
        found = find([folder / each])
        listing.add(found)
        labels |= dict.fromkeys(found.images, label)
    return Labeled(classes, listing, labels)


def check_counts(name: str, classes: Sequence[str], label_N: Tensor, fewest: int) -> None:
    """Raise ``ValueError``, in the name of an argument, if a class has fewer than ``fewest`` images."""
    for each, count in zip(classes, label_N.bincount(minlength=len(classes)).tolist(), strict=True):
        if count < fewest:
            raise ValueError(
                f"{name}: expected at least {fewest} readable images of each class, got {count} of {each!r}"
            )


def split(label_N: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two parts, drawn class by class: the rest, and about ``share`` of each class, at least one."""
    rest, taken = [], []
    for label in label_N.unique().tolist():
        (place,) = (label_N == label).nonzero(as_tuple=True)
        place = place[torch.randperm(len(place), generator=generator)]
        count = max(1, round(share * len(place)))
        taken.append(place[:count])
        rest.append(place[count:])
    return torch.cat(rest), torch.cat(taken)
