"""The ``.alit`` format: token indices of many images in one checksummed file; byte by byte in docs/alit-format.md.

Version 2 holds sizes and a name of each image (``image_records.py``), version 1 neither. Both are read.

A reader trusts nothing: the size of the data follows from the header and must be met exactly, so that counts are
bounded by bytes that are there; then the checksum, then every value. It reads in blocks: beside the arrays that it
returns, it takes hardly any memory.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .image_records import RECORD, ImageInfo, from_records, to_records

MAGIC = b"\x89ALIT\r\n\x1a"
VERSIONS = 1, 2
#: magic, version, reserved, fingerprint, codebook size, image height, image width, images, tokens
HEADER = struct.Struct("<8sHH16sIIIII")
#: Behind the header of version 2: total bytes of all names.
NAME_BYTES = struct.Struct("<I")
CHECKSUM = struct.Struct("<I")
MAX_LENGTH = 2**16 - 1
MAX_TOKENS = 2**31 - 1
#: Bytes, lengths or indices read or written at once. A multiple of 8: blocks of indices end at a byte boundary.
BLOCK = 2**16
#: Images whose names are read at once.
FEW = 2**12


class FormatError(ValueError):
    """Data that is no ``.alit`` file, is damaged, or was written by another model."""


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of the model that wrote the tokens, as a reader needs it; see :meth:`alit.AdaptiveTokenizer.identity`.

    Attributes:
        fingerprint: 16 bytes that depend on every weight.
        codebook_size: number of codes, 1 to 2^31.
        image_size: (height, width) in pixels.
    """

    fingerprint: bytes
    codebook_size: int
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.fingerprint) != 16:
            raise ValueError(f"fingerprint: expected 16 bytes, got {len(self.fingerprint)}")
        if not 1 <= self.codebook_size <= 2**31:
            raise ValueError(f"codebook_size: expected 1 to 2^31, got {self.codebook_size}")
        if not all(1 <= size < 2**32 for size in self.image_size):
            raise ValueError(f"image_size: expected 1 to 2^32 - 1, got {self.image_size}")

    @property
    def bits(self) -> int:
        """Bits per stored index: ceil(log2(codebook_size)), at least 1."""
        return max(1, (self.codebook_size - 1).bit_length())


def dump(
    identity: ModelIdentity,
    lengths: np.ndarray,
    indices: np.ndarray,
    images: ImageInfo | None = None,
) -> bytes:
    """Bytes of an ``.alit`` file.

    Args:
        lengths: (B,) int64.
        indices: (T,) int64.
        images: sizes and names, which version 2 holds; None writes version 1.

    Raises:
        ValueError: an index that is no code of the model, more than 65,535 tokens for an image, 2^31 or more in all; a
            size or name that no file can hold.
    """
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= MAX_LENGTH:
        raise ValueError(f"lengths: expected 0 to {MAX_LENGTH}, got up to {lengths.max()}")
    if len(indices) != lengths.sum() or len(indices) > MAX_TOKENS:
        raise ValueError(
            f"indices: expected {lengths.sum()}, the sum of the lengths, got {len(indices)}"
        )
    if len(indices) and not 0 <= indices.min() <= indices.max() < identity.codebook_size:
        raise ValueError(
            f"indices: expected 0..{identity.codebook_size - 1}, got {indices.min()}..{indices.max()}"
        )
    file = io.BytesIO()
    file.write(
        HEADER.pack(
            *(MAGIC, 1 if images is None else 2, 0, identity.fingerprint),
            *(identity.codebook_size, *identity.image_size, len(lengths), len(indices)),
        )
    )
    records, names = np.empty(0, RECORD), b""
    if images is not None:
        records, names = to_records(images, len(lengths))
        if len(names) >= 2**32:
            raise ValueError(f"names: expected less than 2^32 bytes of them, got {len(names)}")
        file.write(NAME_BYTES.pack(len(names)))
    for first in range(0, len(lengths), BLOCK):
        file.write(lengths[first : first + BLOCK].astype("<u2").tobytes())
    file.write(records.tobytes() + names)
    for first in range(0, len(indices), BLOCK):
        words = indices[first : first + BLOCK].astype("<i8").view(np.uint8).reshape(-1, 8)
        digits = np.unpackbits(words, axis=1, count=identity.bits, bitorder="little")
        file.write(np.packbits(digits, bitorder="little").tobytes())
    file.write(CHECKSUM.pack(zlib.crc32(file.getbuffer())))
    return file.getvalue()


class Reader:
    """Reader of an ``.alit`` file: checks every byte first, keeps the file open and reads parts of it on request.

    Args:
        file: binary and seekable; its size is compared with the header before more of it is read.

    Attributes:
        identity: identity of the model that wrote the file.
        version: 1 or 2.
        image_count, token_count, size: number of images and of tokens; bytes of the file.
        histogram: number of images by length in tokens, lengths ascending.
        pixels: total pixels of all images, as they were encoded.

    Raises:
        FormatError: invalid data; in each method, a file that has become shorter.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        header = self._read(0, min(self.size, HEADER.size))
        if self.size < HEADER.size + CHECKSUM.size or not header.startswith(MAGIC):
            raise FormatError(
                f"not an .alit file, as alit encode writes them: expected it to begin with {MAGIC!r}"
            )
        _, self.version, reserved, fingerprint, codes, *sizes = HEADER.unpack(header)
        height, width, self.image_count, self.token_count = sizes
        if self.version not in VERSIONS:
            raise FormatError(
                f"version: expected 1 or 2, got {self.version}; written by a later alit"
            )
        try:
            self.identity = ModelIdentity(fingerprint, codes, (height, width))
        except ValueError as error:
            raise FormatError(f"damaged header: {error}") from error
        self._place_parts()
        self._end = self._indices + (self.token_count * self.identity.bits + 7) // 8
        if self.size != self._end + CHECKSUM.size:
            raise FormatError(
                f"truncated or damaged: {self.image_count} images with {self.token_count} tokens take "
                f"{self._end + CHECKSUM.size} bytes in version {self.version}, got {self.size}"
            )
        self._check_sum()
        if reserved != 0:
            raise FormatError(f"reserved field: expected 0, got {reserved}")
        self.histogram = self._histogram()
        self.pixels = self._check_images()
        self._check_indices()

    def _place_parts(self) -> None:
        """Set the byte position at which each part begins, from the header."""
        self._lengths, names, record = HEADER.size, 0, 0
        if self.version == 2:
            (names,) = NAME_BYTES.unpack(self._read(HEADER.size, NAME_BYTES.size))
            self._lengths, record = HEADER.size + NAME_BYTES.size, RECORD.itemsize
        self._records = self._lengths + 2 * self.image_count
        self._names = self._records + record * self.image_count
        self._indices = self._names + names

    def _check_sum(self) -> None:
        checksum = 0
        for place in range(0, self._end, BLOCK):
            checksum = zlib.crc32(self._read(place, min(BLOCK, self._end - place)), checksum)
        if CHECKSUM.unpack(self._read(self._end, CHECKSUM.size)) != (checksum,):
            raise FormatError("damaged: the checksum does not match")

    def _histogram(self) -> dict[int, int]:
        histogram: Counter[int] = Counter()
        for first in range(0, self.image_count, BLOCK):
            lengths = self.lengths(first, min(BLOCK, self.image_count - first))
            values, counts = np.unique(lengths, return_counts=True)
            histogram.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        total = sum(length * count for length, count in histogram.items())
        if self.token_count > MAX_TOKENS or total != self.token_count:
            raise FormatError(f"lengths: expected a sum of {self.token_count}, got {total}")
        return dict(sorted(histogram.items()))

    def _check_images(self) -> int:
        """Check sizes and names of all images, and return their total number of pixels; raises ``FormatError``."""
        height, width = self.identity.image_size
        if self.version == 1:
            return self.image_count * height * width
        pixels, place = 0, self._names
        self._names_from: list[int] = []  # byte position of the name of every FEW-th image
        for first in range(0, self.image_count, FEW):
            self._names_from.append(place)
            records = self._some_records(first, min(FEW, self.image_count - first))
            end = place + int(records["name"].sum(dtype=np.int64))
            if end > self._indices:
                raise FormatError("names: expected them to end where the indices begin")
            try:
                images = from_records(records, self._read(place, end - place))
            except ValueError as error:
                raise FormatError(str(error)) from error
            pixels += sum(height * width for height, width in images.sizes.tolist())
            place = end
        if place != self._indices:
            raise FormatError("names: expected them to end where the indices begin")
        return pixels

    def _some_records(self, first: int, count: int) -> np.ndarray:
        place = self._records + RECORD.itemsize * first
        return np.frombuffer(self._read(place, RECORD.itemsize * count), RECORD)

    def _check_indices(self) -> None:
        codes, bits = self.identity.codebook_size, self.identity.bits
        if self.token_count * bits % 8:
            (last,) = self._read(self._end - 1, 1)
            if last >> self.token_count * bits % 8:
                raise FormatError("indices: expected zero bits behind the last one")
        if codes == 2**bits:
            return  # every index is a code
        for first in range(0, self.token_count, BLOCK):
            highest = int(self.indices(first, min(BLOCK, self.token_count - first)).max())
            if highest >= codes:
                raise FormatError(f"indices: expected 0..{codes - 1}, got {highest}")

    def expect(self, model: ModelIdentity) -> None:
        """Raise ``FormatError`` if another model wrote the file."""
        if self.identity != model:
            raise FormatError(
                f"written by another model: expected {_described(model)}, got {_described(self.identity)}"
            )

    def lengths(self, first: int, count: int) -> np.ndarray:
        """Lengths in tokens of ``count`` images from ``first`` on, (count,) int64."""
        data = self._read(self._lengths + 2 * first, 2 * count)
        return np.frombuffer(data, "<u2").astype(np.int64)

    def sizes(self, first: int, count: int) -> np.ndarray:
        """Height and width in pixels, as encoded, of ``count`` images from ``first`` on, (count, 2) int64."""
        if self.version == 1:
            return np.broadcast_to(np.array(self.identity.image_size), (count, 2))
        return self._some_records(first, count)["size"].astype(np.int64)

    def images(self, first: int, count: int) -> ImageInfo:
        """Sizes and names of ``count`` images from ``first`` on; version 1 has the encoded sizes alone."""
        if self.version == 1:
            unknown = np.zeros((count, 2), np.int64)
            return ImageInfo(self.sizes(first, count), unknown, unknown, [""] * count)
        nearest = first // FEW
        before = self._some_records(nearest * FEW, first % FEW)["name"].sum(dtype=np.int64)
        records = self._some_records(first, count)
        place = (self._names_from[nearest] if count else self._names) + int(before)
        return from_records(records, self._read(place, int(records["name"].sum(dtype=np.int64))))

    def indices(self, first: int, count: int) -> np.ndarray:
        """``count`` token indices from ``first`` on, counted over all images, (count,) int64."""
        bits, indices = self.identity.bits, np.empty(count, np.int64)
        for done in range(0, count, BLOCK):
            block = indices[done : done + BLOCK]
            begin = (first + done) * bits
            place, end = begin // 8, (begin + len(block) * bits + 7) // 8
            packed = np.frombuffer(self._read(self._indices + place, end - place), np.uint8)
            digits = np.unpackbits(packed, bitorder="little")[begin % 8 :][: len(block) * bits]
            words = np.zeros((len(block), 64), np.uint8)
            words[:, :bits] = digits.reshape(-1, bits)
            block[:] = np.packbits(words, axis=1, bitorder="little").view("<i8")[:, 0]
        return indices

    def _read(self, place: int, count: int) -> bytes:
        self._file.seek(place)
        data = self._file.read(count)
        if len(data) < count:
            raise FormatError(f"truncated: expected {self.size} bytes")
        return data


def _described(model: ModelIdentity) -> str:
    height, width = model.image_size
    return f"{model.fingerprint.hex()[:12]} with {model.codebook_size} codes at {height}x{width}"
