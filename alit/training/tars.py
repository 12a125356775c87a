"""Shards: names of tar files, and the images in one.

A name is a local path, whatever it looks like, unless addresses are allowed: then http and https are read as streams.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from ..atomic_files import reading
from ..checks import printable
from .log import reason

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
#: Most shards of one pattern.
MOST_SHARDS = 100_000
#: Most bytes of an image's file: more is taken for damage.
LARGEST_IMAGE = 1 << 28
#: Most kinds of other members that are told apart.
MOST_KINDS = 100

#: Exceptions of tarfile on damaged files; recursion comes from extended headers of extended headers.
_DAMAGED = (
    *(tarfile.TarError, OSError, EOFError, ValueError, LookupError, ArithmeticError, TypeError),
    *(RecursionError, struct.error, AttributeError),
)


class Member(NamedTuple):
    """Member of a shard with the suffix of an image: its name, and its bytes, undecoded."""

    name: str
    content: bytes


class NoImages(ValueError):
    """Exception: a shard is whole and holds no image; the message says what it holds."""


def expand(pattern: str) -> list[str]:
    """The names of a pattern, ``x-{000..099}.tar`` or ``{a,b}.tar``, in order; the pattern itself if it is a file.

    Raises:
        ValueError: more than 100,000 names, or more than 16 braces.
    """
    if os.path.isfile(pattern):
        return [pattern]
    if pattern.count("{") > 16 or len(pattern) > 10_000:
        raise ValueError("data: expected at most 16 braces in 10,000 characters, got more")
    return _expanded(pattern)


def _expanded(text: str) -> list[str]:
    """Expand braces as in a shell: nested ones too; those without a comma or a range are plain characters."""
    opening = text.find("{")
    cuts, depth = [opening], 0
    for at in range(max(opening, 0), len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0 or (depth == 1 and text[at] == ","):
            cuts.append(at)
        if depth == 0:
            break
    if depth or opening < 0:
        return [text]
    parts = [text[start + 1 : end] for start, end in itertools.pairwise(cuts)]
    choices, rests = _choices(parts), _expanded(text[cuts[-1] + 1 :])
    _check_count(len(choices) * len(rests))
    return [text[:opening] + choice + rest for choice in choices for rest in rests]


def _choices(parts: list[str]) -> list[str]:
    """Alternatives of two braces, from what stands between them, cut at its commas."""
    if match := re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", ",".join(parts), re.ASCII):
        first, last = int(match[1]), int(match[2])
        _check_count(abs(last - first) + 1)
        padded = any(re.match(r"-?0\d", x) for x in match.groups())
        width = max(map(len, match.groups())) if padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    choices = [choice for part in parts for choice in _expanded(part)]
    _check_count(len(choices))
    return choices if len(parts) > 1 else [f"{{{choice}}}" for choice in choices]


def _check_count(count: int) -> None:
    if count > MOST_SHARDS:
        raise ValueError(f"data: expected at most {MOST_SHARDS} shards, got {count}")


def check_name(name: str, addresses: bool) -> None:
    """Check that a shard is there, as far as can be told without opening an address.

    Raises:
        OSError: no such file.
        ValueError: an address that is not allowed, or none of http and https.
    """
    if os.path.isfile(name):
        return
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise FileNotFoundError(f"{name}: no such shard")
    if not addresses:
        raise ValueError(f"data: {name} is an address; expected files, or --allow-addresses")
    if not name.startswith(("http://", "https://")):
        raise ValueError(f"data: expected http:// or https://, got {name}")


class _Bounded:
    """File whose reads ask for no more than there is, whatever a header says."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.size = os.fstat(file.fileno()).st_size

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.tell())
        return self.file.read(left if count < 0 else min(count, left))


@contextmanager
def _opened(name: str, addresses: bool) -> Iterator[tarfile.TarFile]:
    if os.path.isfile(name) or not addresses:
        # tarfile needs no more of a file than the three methods that a bounded one has.
        with (
            reading(name) as file,
            tarfile.TarFile(fileobj=cast(BinaryIO, _Bounded(file))) as tar,
        ):
            yield tar
            _check_end(tar, file)
    else:
        with (
            urllib.request.urlopen(name, timeout=60) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            yield tar


def _check_end(tar: tarfile.TarFile, file: BinaryIO) -> None:
    """Check that a tar file ends where tarfile stopped: it ends in silence at a damaged header, too."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members except folders and hidden files; none is kept in memory."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        if tar.offset <= member.offset:
            raise tarfile.ReadError(f"a negative size at byte {member.offset}")
        if not member.isdir() and not PurePosixPath(member.name).name.startswith("."):
            yield member


def members(name: str, start: int, skipped: list[str], *, addresses: bool) -> Iterator[Member]:
    """Yield the images of a shard in their order, from the one numbered ``start``.

    A line for the members that belong to no image, and one for what ends a damaged shard, are added to ``skipped``.

    Raises:
        NoImages: the shard is whole and there is none in it.
    """
    others: Counter[str] = Counter()
    count = 0
    whole = True
    try:
        with _opened(name, addresses) as tar:
            # Consecutive members with one name up to the first dot belong together.
            for _, members in itertools.groupby(_members(tar), _key):
                stem, left = None, Counter[str]()
                for member in members:
                    path = PurePosixPath(member.name)
                    if kind := _other(member):
                        left[kind if kind in left or len(left) < MOST_KINDS else "others"] += 1
                    elif path.stem != stem:  # else another form of the image before it
                        stem = path.stem
                        count += 1
                        if count > start:
                            yield Member(printable(member.name), _content(tar, member))
                if stem is None:
                    for kind, number in left.items():
                        others[kind if len(others) < MOST_KINDS else "others"] += number
    except _DAMAGED as error:
        whole = False
        skipped.append(f"{name}: damaged after {count} images ({reason(error)})")
    held = ", ".join(f"{number} {kind}" for kind, number in others.most_common(10)) or "nothing"
    if not count and whole:
        raise NoImages(f"{name}: no image ({', '.join(SUFFIXES)}) in it, but {held}")
    if others:
        skipped.append(f"{name}: members without an image ({held})")


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, _, name = member.name.rpartition("/")
    return folder, name.partition(".")[0]


def _other(member: tarfile.TarInfo) -> str:
    """Kind of a member that is no image; empty for an image."""
    if not member.isreg() or member.issparse():
        return "links or special files"
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in SUFFIXES and member.size > LARGEST_IMAGE:
        return f"of more than {LARGEST_IMAGE} bytes"
    return "" if suffix in SUFFIXES else printable(suffix[:20]) or "without a suffix"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content
