"""Search for images in folders and their subfolders; files that are left out are listed with a reason."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .console import printable
from .images import formats

_HEIC = "HEIC, which pillow-heif reads: pip install 'alit[heic]'"
#: Suffixes of files that people would call images, by the reason for leaving them out unless Pillow reads them.
_REASONS = {
    _HEIC: ".heic .heif .hif .heics .heifs",
    "camera raw, which is not read: develop it to JPEG, PNG or TIFF": ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2"
    " .orf .rw2 .raf .pef .srw .x3f .3fr .fff .iiq .erf .kdc .dcr .mef .mos .mrw .rwl .gpr .raw",
    "a drawing, which is not read: export it as PNG": ".svg .svgz .eps .ps .ai .cdr",
    "a document of another program: export it as PNG": ".psd .psb .xcf .kra .clip .afphoto .procreate",
    "of a format that this Pillow does not read: convert it to PNG": ".jxl .avif .avifs .webp .jp2 .j2k .jpx .jxr .wdp"
    " .hdp .exr .hdr .bpg .flif .wmf .emf",
}
#: Type that an image is loaded as.
Loaded = TypeVar("Loaded")
_UNREAD = {suffix: reason for reason, x in _REASONS.items() for suffix in x.split()}


@dataclass
class Listing:
    """Images that were found, and files that were left out.

    Attributes:
        images: files to try, in order.
        left_out: a line for every file in a folder that people would call an image, but that is not read.
        unreadable: a line for every image that :meth:`loaded` could not read.
        others: number of files in folders that nobody would call images.
    """

    images: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    others: int = 0

    def add(self, other: Listing) -> None:
        """Add the entries of another listing."""
        self.images += other.images
        self.left_out += other.left_out
        self.unreadable += other.unreadable
        self.others += other.others

    def loaded(self, load: Callable[[Path], Loaded]) -> Iterator[tuple[Path, Loaded]]:
        """Yield path and content of each image that can be read; note the others as ``unreadable``."""
        for path in self.images:
            try:
                image = load(path)
            except OSError as error:
                reason = _reason(path, error)
                self.unreadable.append(f"{printable(path)}: not a readable image ({reason})")
            else:
                yield path, image

    def batches(
        self, load: Callable[[Path], Tensor], size: int
    ) -> Iterator[tuple[list[Path], Tensor]]:
        """Yield paths and stacked tensors of the images that can be read, at most ``size`` at a time."""
        readable = self.loaded(load)
        while batch := list(itertools.islice(readable, size)):
            paths, images = zip(*batch, strict=True)
            yield list(paths), torch.stack(images)

    def beside(self) -> str:
        """Message that there are other files; empty if there are none."""
        if self.others == 1:
            return "1 other file is no image"
        return f"{self.others} other files are no images" if self.others else ""

    @property
    def readable(self) -> int:
        """Number of images, without those that turned out to be unreadable."""
        return len(self.images) - len(self.unreadable)

    def names_skipped(self) -> list[str]:
        """A line for each file that was skipped."""
        return [*self.left_out, *self.unreadable]

    def skipped(self) -> str:
        """Message about skipped files: their number, and an indented line for each; empty if there are none."""
        lines = self.names_skipped()
        total = len(self.images) + len(self.left_out)
        return "\n  ".join([f"{len(lines)} of {total} files skipped:", *lines]) if lines else ""


def find(paths: Sequence[Path], *, recursive: bool = True) -> Listing:
    """List the given files, whatever their names, and the images in the given folders, each folder's by name.

    Hidden files and folders are ignored. Links to folders are followed, into each folder once.

    Args:
        recursive: folders within folders too.

    Raises:
        FileNotFoundError: no such file or folder; no image at all.
        OSError: a given folder cannot be read.
    """
    found = Listing()
    for path in paths:
        if path.is_dir():
            _add_folder(found, path, recursive)
        elif path.is_file():
            found.images.append(path)
        else:
            raise FileNotFoundError(f"{printable(path)}: no such file or folder")
    if not found.images:
        within = "" if recursive else ", folders within left alone"
        reasons = f"; {found.skipped()}" if found.left_out else ""
        names = ", ".join(map(printable, paths))
        raise FileNotFoundError(f"{names}: no image found{within}{reasons}")
    return found


def in_folder(folder: Path, *, recursive: bool = True) -> Listing:
    """List the images in one folder, as :func:`find`.

    Raises:
        OSError: not a folder, one that cannot be read, or one without images.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)}: not a folder")
    return find([folder], recursive=recursive)


def distinct(names: Iterable[str]) -> list[str]:
    """The names in their order, with duplicates numbered: ``a``, ``a-2``.

    Names that differ only in case or Unicode composition are duplicates, as for some file systems.
    """
    found: list[str] = []
    taken: dict[str, int] = {}  # the last number tried
    for name in names:
        first, own = _folded(name), name
        while _folded(own) in taken:
            taken[first] += 1
            own = f"{name}-{taken[first]}"
        taken[_folded(own)] = 1
        found.append(own)
    return found


def _folded(name: str) -> str:
    """Key of a name, equal for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _add_folder(found: Listing, folder: Path, recursive: bool) -> None:
    known = formats()
    kinds = {suffix: kind in known for suffix, kind in Image.registered_extensions().items()}
    images: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        try:
            status = inner.stat()
            names = sorted(os.listdir(inner))
        except OSError as error:
            if inner is folder:
                raise
            found.left_out.append(f"{printable(inner)}: {error.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for path in (inner / name for name in names if not name.startswith(".")):
            suffix = path.suffix.lower()
            if path.is_dir():
                folders.append(path)
            elif kinds.get(suffix):
                if path.is_file():
                    images.append(path)
                else:
                    found.left_out.append(f"{printable(path)}: a link to nothing, or no file")
            elif suffix in _UNREAD:
                found.left_out.append(f"{printable(path)}: {_UNREAD[suffix]}")
            else:
                found.others += 1
        if recursive:
            waiting += reversed(folders)
    found.images += sorted(images)


def _reason(path: Path, error: OSError) -> str:
    """Reason why an image cannot be read; for what Pillow cannot identify, by its content or the suffix of its name."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error)
    with path.open("rb") as file:
        head = file.read(12)
    brand = head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
    if head[4:8] == b"ftyp" and brand:
        return _HEIC
    return _UNREAD.get(path.suffix.lower(), str(error))
