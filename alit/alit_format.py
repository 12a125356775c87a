"""The ``.alit`` format: token indices of many images in one checksummed file; byte by byte in docs/alit-format.md.

A reader trusts nothing: the size of the data follows from the header and must be met exactly, so that counts are
bounded by bytes that are there; then the checksum, then every value. It reads in blocks: beside the arrays that it
returns, it takes no memory to speak of.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MAGIC = b"\x89ALIT\r\n\x1a"
VERSION = 1
#: magic, version, reserved, fingerprint, codebook size, image height, image width, images, tokens
HEADER = struct.Struct("<8sHH16sIIIII")
CHECKSUM = struct.Struct("<I")
MAX_LENGTH = 2**16 - 1
MAX_TOKENS = 2**31 - 1
#: What is read and written at once: bytes, lengths or indices. A multiple of 8 indices ends with a byte.
BLOCK = 2**16


class FormatError(ValueError):
    """Data that is no ``.alit`` file, is damaged, or was written by another model."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a reader has to know of the model that wrote the tokens; see :meth:`alit.AdaptiveTokenizer.identity`.

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
        """Bits of a stored index: ceil(log2(codebook_size)), at least 1."""
        return max(1, (self.codebook_size - 1).bit_length())


def dump(identity: ModelIdentity, lengths: np.ndarray, indices: np.ndarray) -> bytes:
    """The bytes of a file.

    Args:
        lengths: (B,) int64.
        indices: (T,) int64.

    Raises:
        ValueError: an index that is no code of the model, more than 65,535 tokens for an image, 2^31 or more in all.
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
            *(MAGIC, VERSION, 0, identity.fingerprint, identity.codebook_size),
            *(*identity.image_size, len(lengths), len(indices)),
        )
    )
    for first in range(0, len(lengths), BLOCK):
        file.write(lengths[first : first + BLOCK].astype("<u2").tobytes())
    for first in range(0, len(indices), BLOCK):
        words = indices[first : first + BLOCK].astype("<i8").view(np.uint8).reshape(-1, 8)
        digits = np.unpackbits(words, axis=1, count=identity.bits, bitorder="little")
        file.write(np.packbits(digits, bitorder="little").tobytes())
    file.write(CHECKSUM.pack(zlib.crc32(file.getbuffer())))
    return file.getvalue()


class Reader:
    """A file whose every byte is right; it stays open, and parts of it are read when they are asked for.

    Args:
        file: binary and seekable; its size is held against the header before more of it is read.

    Attributes:
        identity: of the model that wrote it.
        image_count, token_count, size: how many; size in bytes.
        histogram: how many images each length has, by length.

    Raises:
        FormatError: whatever is wrong with the data; in each method, that the file has become shorter.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        header = self._read(0, min(self.size, HEADER.size))
        if self.size < HEADER.size + CHECKSUM.size or not header.startswith(MAGIC):
            raise FormatError(f"not an .alit file: expected it to begin with {MAGIC!r}")
        _, version, reserved, fingerprint, codes, height, width, *counts = HEADER.unpack(header)
        self.image_count, self.token_count = counts
        if version != VERSION:
            raise FormatError(
                f"version: expected {VERSION}, got {version}; written by a later alit"
            )
        try:
            self.identity = ModelIdentity(fingerprint, codes, (height, width))
        except ValueError as error:
            raise FormatError(f"damaged header: {error}") from error
        self._indices = HEADER.size + 2 * self.image_count
        self._end = self._indices + (self.token_count * self.identity.bits + 7) // 8
        if self.size != self._end + CHECKSUM.size:
            raise FormatError(
                f"truncated or damaged: {self.image_count} images with {self.token_count} tokens take "
                f"{self._end + CHECKSUM.size} bytes, got {self.size}"
            )
        self._check_sum()
        if reserved != 0:
            raise FormatError(f"reserved field: expected 0, got {reserved}")
        self.histogram = self._histogram()
        self._check_indices()

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

    def _check_indices(self) -> None:
        codes, bits = self.identity.codebook_size, self.identity.bits
        if self.token_count * bits % 8:
            (last,) = self._read(self._end - 1, 1)
            if last >> self.token_count * bits % 8:
                raise FormatError("indices: expected zero bits behind the last one")
        if codes == 2**bits:
            return  # every index is one
        for first in range(0, self.token_count, BLOCK):
            highest = int(self.indices(first, min(BLOCK, self.token_count - first)).max())
            if highest >= codes:
                raise FormatError(f"indices: expected 0..{codes - 1}, got {highest}")

    def expect(self, model: ModelIdentity) -> None:
        """Raise ``FormatError`` where another model wrote the file."""
        if self.identity != model:
            raise FormatError(
                f"written by another model: expected {_described(model)}, got {_described(self.identity)}"
            )

    def lengths(self, first: int, count: int) -> np.ndarray:
        """Those of ``count`` images from ``first`` on. (count,) int64"""
        data = self._read(HEADER.size + 2 * first, 2 * count)
        return np.frombuffer(data, "<u2").astype(np.int64)

    def indices(self, first: int, count: int) -> np.ndarray:
        """``count`` indices from ``first`` on, counted over all images. (count,) int64"""
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
