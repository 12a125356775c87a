"""Image records of ``.alit`` files of version 2: sizes and file name of each image, beside its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Record of an image: heights and widths, and bytes of its name.
RECORD = np.dtype(
    [("size", "<u4", 2), ("original", "<u4", 2), ("padding", "u1", 2), ("name", "u1")]
)
MAX_NAME = 255
#: Characters that names do not hold: controls, path separators, line and direction marks, surrogates. All are listed
#: here, so that files do not depend on the version of Unicode.
_IN_NO_NAME = re.compile(
    r"[\x00-\x1f\x7f-\x9f/\\:\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class ImageInfo(NamedTuple):
    """Sizes and names of B images; sizes are heights and widths in pixels.

    Attributes:
        sizes: (B, 2) int64, of what was encoded.
        originals: (B, 2) int64, of the image, or the part of it, that was encoded; 0 and 0 where that is unknown.
        padding: (B, 2) int64, rows at the bottom and columns at the right of what was encoded that were added to it.
        names: of files, without folders; empty where there is none. See :func:`file_name`.
    """

    sizes: np.ndarray
    originals: np.ndarray
    padding: np.ndarray
    names: Sequence[str]


def file_name(name: str) -> str:
    """Name as ``.alit`` files may hold it: at most 255 bytes of UTF-8, without paths and controls (``_`` instead)."""
    name = _IN_NO_NAME.sub("_", name).encode()[:MAX_NAME].decode(errors="ignore")
    return "_" if name in (".", "..") else name


def to_records(images: ImageInfo, count: int) -> tuple[np.ndarray, bytes]:
    """Records (``count``,) of images, and their names in UTF-8, one behind another.

    Raises:
        ValueError: sizes or names that no file can hold, or not ``count`` of them.
    """
    if len(images.names) != count:
        raise ValueError(f"names: expected one per image ({count}), got {len(images.names)}")
    names = [name.encode(errors="surrogatepass") for name in images.names]
    records = np.empty(count, RECORD)
    for field, values, high in (
        ("size", images.sizes, 2**32),
        ("original", images.originals, 2**32),
        ("padding", images.padding, 2**8),
    ):
        if values.shape != (count, 2):
            raise ValueError(f"{field}: expected shape ({count}, 2), got {values.shape}")
        if count and not 0 <= values.min() <= values.max() < high:
            got = f"got {values.min()} to {values.max()}"
            raise ValueError(f"{field}: expected 0 to {high - 1}, {got}")
        records[field] = values
    _check(images)
    records["name"] = [len(name) for name in names]
    return records, b"".join(names)


def from_records(records: np.ndarray, names: bytes) -> ImageInfo:
    """Sizes and names of images from their records; inverse of :func:`to_records`.

    Raises:
        ValueError: records that :func:`to_records` does not give.
    """
    ends = records["name"].cumsum(dtype=np.int64).tolist()
    parts = zip([0, *ends], ends, strict=False)
    try:
        texts = [names[start:end].decode() for start, end in parts]
    except UnicodeDecodeError as error:
        raise ValueError(f"names: expected UTF-8 ({error})") from error
    size, original, padding = (
        records[field].astype(np.int64) for field in ("size", "original", "padding")
    )
    images = ImageInfo(size, original, padding, texts)
    _check(images)
    return images


def _check(images: ImageInfo) -> None:
    sizes, originals, padding, names = images
    if (sizes < 1).any():
        raise ValueError("size: expected at least 1, got 0")
    if (padding >= sizes).any():
        raise ValueError("padding: expected less than the size, got as much")
    if ((originals == 0).sum(1) == 1).any():
        raise ValueError("original: expected height and width, or 0 for both, got one of them")
    for name in names:
        if file_name(name) != name:
            raise ValueError(
                f"names: expected those of files, without paths and controls, got {name!a}"
            )
