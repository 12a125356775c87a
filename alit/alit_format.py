"""The ``.alit`` format: token indices of many images in one checksummed file; byte by byte in docs/alit-format.md.

A reader trusts nothing: the size of the data follows from the header and must be met exactly, so that counts are
bounded by bytes that are there; then the checksum, then every value. Reading needs at most about 200 bytes of memory
for each byte of data (one-bit indices), 32 with 4096 codes.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAGIC = b"\x89ALIT\r\n\x1a"
VERSION = 1
#: magic, version, reserved, fingerprint, codebook size, image height, image width, images, tokens
HEADER = struct.Struct("<8sHH16sIIIII")
CHECKSUM = struct.Struct("<I")
MAX_LENGTH = 2**16 - 1
MAX_TOKENS = 2**31 - 1


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


class Contents(NamedTuple):
    """What a file holds: ``lengths`` (B,) int64, ``indices`` (T,) int64."""

    identity: ModelIdentity
    lengths: np.ndarray
    indices: np.ndarray


def dump(contents: Contents) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: an index that is no code of the model, more than 65,535 tokens for an image, 2^31 or more in all.
    """
    identity, lengths, indices = contents
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
    header = HEADER.pack(
        *(MAGIC, VERSION, 0, identity.fingerprint, identity.codebook_size),
        *(*identity.image_size, len(lengths), len(indices)),
    )
    body = header + lengths.astype("<u2").tobytes() + _pack_bits(indices, identity.bits)
    return body + CHECKSUM.pack(zlib.crc32(body))


def parse(data: bytes) -> Contents:
    """Inverse of :func:`dump`.

    Raises:
        FormatError: whatever is wrong with the data.
    """
    if len(data) < HEADER.size + CHECKSUM.size or data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"not an .alit file: expected it to begin with {MAGIC!r}")
    _, version, reserved, fingerprint, codes, height, width, images, tokens = HEADER.unpack_from(
        data
    )
    if version != VERSION:
        raise FormatError(f"version: expected {VERSION}, got {version}; written by a later alit")
    try:
        identity = ModelIdentity(fingerprint, codes, (height, width))
    except ValueError as error:
        raise FormatError(f"damaged header: {error}") from error
    payload = HEADER.size + 2 * images
    expected = payload + (tokens * identity.bits + 7) // 8 + CHECKSUM.size
    if len(data) != expected:
        raise FormatError(
            f"truncated or damaged: {images} images with {tokens} tokens take {expected} bytes, got {len(data)}"
        )
    (checksum,) = CHECKSUM.unpack_from(data, expected - CHECKSUM.size)
    if zlib.crc32(memoryview(data)[: -CHECKSUM.size]) != checksum:
        raise FormatError("damaged: the checksum does not match")
    if reserved != 0:
        raise FormatError(f"reserved field: expected 0, got {reserved}")
    lengths = np.frombuffer(data, "<u2", images, HEADER.size).astype(np.int64)
    if tokens > MAX_TOKENS or int(lengths.sum()) != tokens:
        raise FormatError(f"lengths: expected a sum of {tokens}, got {int(lengths.sum())}")
    packed = np.frombuffer(data, np.uint8, expected - CHECKSUM.size - payload, payload)
    indices = _unpack_bits(packed, tokens, identity.bits)
    if tokens and int(indices.max()) >= codes:
        raise FormatError(f"indices: expected 0..{codes - 1}, got {int(indices.max())}")
    return Contents(identity, lengths, indices)


def _pack_bits(indices: np.ndarray, bits: int) -> bytes:
    """The lowest ``bits`` bits of each index, lowest bit first, without gaps."""
    digits = np.empty((len(indices), bits), np.uint8)
    for bit in range(bits):
        digits[:, bit] = (indices >> bit) & 1
    return np.packbits(digits, bitorder="little").tobytes()


def _unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    stream = np.unpackbits(packed, bitorder="little")
    if stream[count * bits :].any():
        raise FormatError("indices: expected zero bits behind the last one")
    digits = stream[: count * bits].reshape(count, bits)
    indices = np.zeros(count, np.int64)
    for bit in range(bits):
        indices |= digits[:, bit].astype(np.int64) << bit
    return indices
