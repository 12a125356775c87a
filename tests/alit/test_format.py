""".alit data: round trip, the documented bytes, and what damaged or hostile data do.

``ALIT_FUZZ_EXAMPLES`` sets the number of mutations (500 by default; ``make test-full`` runs 20,000).
"""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from alit import FormatError, ModelIdentity, TokenSequence, alit_format
from alit.alit_format import HEADER, Contents, Reader, dump, parse
from alit.atomic_files import reading
from alit.cli import app
from tests.helpers import hostile
from tests.helpers.hostile import EXAMPLES, memory
from tests.helpers.models import images, model

MUTATIONS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def identity(codes: int = 4096) -> ModelIdentity:
    return ModelIdentity(bytes(range(16)), codes, (256, 192))


def sequence(lengths: list[int], codes: int) -> TokenSequence:
    total = sum(lengths)
    return TokenSequence(torch.tensor(lengths), indices=torch.arange(total) * 7919 % codes)


@pytest.mark.parametrize("codes", (1, 2, 3, 255, 256, 257, 4096, 65536, 2**31))
@pytest.mark.parametrize("lengths", ([], [0], [1], [3, 0, 5], [32, 64, 256]))
def test_round_trip(lengths: list[int], codes: int) -> None:
    tokens = TokenSequence(
        torch.tensor(lengths, dtype=torch.int64),
        indices=torch.randint(0, codes, (sum(lengths),)),
    )
    data = tokens.to_bytes(identity(codes))
    back = TokenSequence.from_bytes(data, identity(codes))
    assert torch.equal(back.rows, tokens.rows) and torch.equal(back.lengths, tokens.lengths)
    bits = max(1, (codes - 1).bit_length())
    assert len(data) == 52 + 2 * len(lengths) + (sum(lengths) * bits + 7) // 8
    assert back.to_bytes(identity(codes)) == data


def test_bytes_are_the_documented_ones() -> None:
    tokens = TokenSequence(torch.tensor([1, 2]), indices=torch.tensor([5, 4, 2]))
    body = bytes.fromhex("89414c49540d0a1a 0100 0000" + bytes(range(16)).hex())
    body += struct.pack("<IIIII", 6, 256, 192, 2, 3) + struct.pack("<HH", 1, 2)
    body += bytes([5 | 4 << 3 | (2 & 3) << 6, 2 >> 2])  # three bits an index, lowest first
    assert tokens.to_bytes(identity(6)) == body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (sequence([9], 7), r"indices: expected 0\.\.4, got 0\.\.6"),
        (sequence([65536], 4), "lengths: expected 0 to 65535, got up to 65536"),
        (TokenSequence(torch.tensor([1]), latents=torch.zeros(1, 3)), "expected indices"),
    ],
)
def test_what_cannot_be_written(tokens: TokenSequence, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens.to_bytes(identity(5))


def test_wrong_model() -> None:
    m = model(bottleneck="quantized")
    own = m.identity()
    tokens = TokenSequence.from_bytes(sequence([3, 6], 32).to_bytes(own), own)
    assert m.decode(tokens).shape == images(2).shape
    with torch.no_grad():
        m.quantize.embedding.weight[3, 2] += 1e-3
    assert model().identity() == own and model(seed=1).identity() != own
    assert model(base="vqgan").identity() != own
    with pytest.raises(FormatError, match=r"written by another model: expected .* with 32 codes"):
        TokenSequence.from_bytes(tokens.to_bytes(own), m.identity())


def with_checksum(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def header(codes: int = 4096, count: int = 1, tokens: int = 1, version: int = 1) -> bytes:
    return HEADER.pack(
        *(b"\x89ALIT\r\n\x1a", version, 0, bytes(16), codes, 256, 256, count, tokens)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an .alit file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "not an .alit file"),
        (with_checksum(header(version=2)), "version: expected 1, got 2"),
        (with_checksum(header(codes=0)), "codebook_size: expected 1 to 2"),
        (with_checksum(header(codes=2**32 - 1)), "codebook_size: expected 1 to 2"),
        (with_checksum(header(count=2**32 - 1, tokens=2**32 - 1)), "truncated or damaged: 4294967"),
        (with_checksum(header(codes=1, count=0, tokens=2**32 - 1)), "truncated or damaged: 0 im"),
        (with_checksum(header(count=1, tokens=0) + b"\x05\x00"), "lengths: expected a sum of 0"),
        (with_checksum(header(codes=3) + b"\x01\x00\x03"), r"indices: expected 0\.\.2, got 3"),
        (with_checksum(header(codes=3) + b"\x01\x00\x05"), "expected zero bits behind"),
        (header(codes=3) + b"\x01\x00\x01" + bytes(4), "the checksum does not match"),
    ],
)
def test_hostile_data(data: bytes, message: str) -> None:
    """Huge counts included: an error at once, and no memory to speak of."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(FormatError, match=message):
            TokenSequence.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 1


VALID = sequence([32, 0, 7, 64], 4000).to_bytes(identity(4000))


@st.composite
def mutated(draw: st.DrawFn, valid: bytes = VALID) -> bytes:
    """Flipped bits, other bytes, insertions, deletions, truncations, transpositions; one to four of them."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "set", "insert", "delete", "cut", "swap", "number")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "cut":
            del data[at:]
        elif kind == "number":  # a header field gets an extreme value
            field = draw(st.sampled_from((28, 32, 36, 40, 44)))
            value = draw(st.sampled_from((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
            data[field : field + 4] = struct.pack("<I", value)
        elif kind == "swap" and data:
            other = draw(st.integers(0, len(data) - 1))
            data[at], data[other] = data[other], data[at]
    return bytes(data)


@MUTATIONS
@given(mutated())
def test_mutations_are_found(data: bytes) -> None:
    """Whatever was changed, reading says so; what reads is what was written."""
    if data == VALID:
        return
    with pytest.raises(FormatError):
        TokenSequence.from_bytes(data, identity(4000))


@MUTATIONS
@given(mutated())
def test_mutations_with_a_mended_checksum(data: bytes) -> None:
    """A forger mends the checksum: then the data read as one valid file, byte for byte, or not at all."""
    forged = with_checksum(data[:-4])
    try:
        contents = parse(forged)
    except FormatError:
        return
    assert dump(contents) == forged
    assert contents.indices.size == 0 or contents.indices.max() < contents.identity.codebook_size


@MUTATIONS
@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    for candidate in (data, VALID[:8] + data, VALID[:48] + data):
        with pytest.raises(FormatError):
            TokenSequence.from_bytes(candidate)


def test_damaged_files(tmp_path: Path) -> None:
    """A file and the same bytes give the same: sequences that are within bounds, or an error that says why."""
    rng, path, most, slowest = random.Random(0), tmp_path / "x.alit", 0, 0.0
    sources = [
        sequence([32, 0, 7, 64], codes).to_bytes(identity(codes)) for codes in (1, 4000, 2**31)
    ]
    for _ in range(EXAMPLES):
        data = hostile.mutated(rng.choice(sources), rng)
        data = with_checksum(data[:-4]) if rng.random() < 0.8 else data
        path.write_bytes(data)
        start = time.process_time()
        with memory() as measured:
            outcomes = []
            for read, source in ((parse, data), (contents_of, path)):
                try:
                    outcomes.append(dump(read(source)))  # type: ignore[operator]
                except FormatError as error:
                    outcomes.append(str(error).encode())
        assert outcomes[0] == outcomes[1]
        most, slowest = max(most, measured.taken), max(slowest, time.process_time() - start)
    assert most <= 100 * 2**20 and slowest < 2


def contents_of(path: Path) -> Contents:
    with reading(path) as file:
        reader = Reader(file)
        parts = [reader.indices(t, 1) for t in range(reader.tokens)]  # each by itself
        lengths = reader.lengths(0, reader.images)
        assert sum(reader.histogram.values()) == len(lengths)
        return Contents(reader.identity, lengths, np.concatenate([np.zeros(0, np.int64), *parts]))


@pytest.mark.parametrize("codes", [2, 5, 4096])
def test_blocks_of_any_size(codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks end changes nothing."""
    tokens = sequence([5, 0, 1, 300, 22, 4], codes)
    data = tokens.to_bytes(identity(codes))
    monkeypatch.setattr(alit_format, "BLOCK", 8)
    assert tokens.to_bytes(identity(codes)) == data
    assert torch.equal(TokenSequence.from_bytes(data).rows, tokens.rows)
    reader = Reader(io.BytesIO(data))
    for first, count in ((0, 332), (3, 0), (3, 1), (7, 9), (13, 300)):
        assert reader.indices(first, count).tolist() == tokens.rows[first : first + count].tolist()


def test_reading_takes_little_memory(tmp_path: Path) -> None:
    """3 million images, most of them empty, with 48 million tokens of one bit each: 12 MB, and 407 as int64."""
    lengths = torch.zeros(3_000_000, dtype=torch.int64)
    lengths[:1000] = 48_000
    tokens = TokenSequence(lengths, indices=torch.zeros(48_000_000, dtype=torch.int64))
    with memory() as measured:
        data = tokens.to_bytes(identity(2))
    assert measured.taken < 2 * len(data) + 20 * 2**20
    (tmp_path / "x.alit").write_bytes(data)
    with memory() as measured:
        done = CliRunner().invoke(app, ["info", str(tmp_path / "x.alit")])
    assert done.exit_code == 0 and "3000000 images, 48000000 tokens" in done.output
    assert measured.taken < 50 * 2**20
    with memory() as measured:
        back = TokenSequence.from_bytes(data)
    assert torch.equal(back.lengths, lengths)
    assert measured.taken < 8 * (len(back.rows) + len(back.lengths)) + 50 * 2**20
