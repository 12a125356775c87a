""".alit data: round trip, the documented bytes, and what damaged or hostile data do.

``ALIT_FUZZ_EXAMPLES`` sets the number of mutations (500 by default; ``make test-full`` runs 20,000).
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alit import FormatError, ModelIdentity, TokenSequence, alit_format
from alit.alit_format import HEADER, Reader, dump
from alit.atomic_files import reading
from alit.cli import app
from tests.helpers.hostile import EXAMPLES, memory, mutated
from tests.helpers.models import images, model


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
    with memory(most=4e6, seconds=1), pytest.raises(FormatError, match=message):
        TokenSequence.from_bytes(data)


def test_damaged_data(tmp_path: Path) -> None:
    """Whatever was changed, reading says so. With a mended checksum the data read as one valid file, or not at all."""
    rng, path = random.Random(0), tmp_path / "x.alit"
    sources = [
        sequence([32, 0, 7, 64], codes).to_bytes(identity(codes)) for codes in (1, 4000, 2**31)
    ]
    for number in range(EXAMPLES):
        valid = sources[number % 3]
        data = mutated(valid, rng)
        data = rng.choice((data, data, data, valid[:8] + data, valid[:48] + rng.randbytes(200)))
        if data != valid:
            with pytest.raises(FormatError):
                TokenSequence.from_bytes(data)
        forged = with_checksum(data[:-4])
        path.write_bytes(forged)
        outcomes = []
        with memory(most=100e6, seconds=2):
            for source, step in ((io.BytesIO(forged), 2**20), (path, 1)):
                try:
                    outcomes.append(rewritten(source, step))
                except FormatError as error:
                    outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        assert isinstance(outcomes[0], str) or outcomes[0] == forged


def rewritten(source: io.BytesIO | Path, step: int) -> bytes:
    """What is read, so many tokens at a time, as it is written anew."""
    with reading(source) if isinstance(source, Path) else source as file:
        reader = Reader(file)
        places = range(0, reader.token_count, step)
        parts = [reader.indices(place, min(step, reader.token_count - place)) for place in places]
        lengths = reader.lengths(0, reader.image_count)
    assert sum(reader.histogram.values()) == len(lengths)
    return dump(reader.identity, lengths, np.concatenate([np.zeros(0, np.int64), *parts]))


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
    for _ in range(3):  # again where other threads of this process took memory meanwhile
        with memory() as writing:
            data = tokens.to_bytes(identity(2))
        if writing.taken < 2 * len(data) + 20 * 2**20:
            break
    else:
        pytest.fail(f"{writing.taken} bytes more for {len(data)}")
    (tmp_path / "x.alit").write_bytes(data)
    with memory(most=50e6):
        done = CliRunner().invoke(app, ["info", str(tmp_path / "x.alit")])
    assert done.exit_code == 0 and "3000000 images, 48000000 tokens" in done.output
    with memory() as reading_back:
        back = TokenSequence.from_bytes(data)
    assert torch.equal(back.lengths, lengths)
    assert reading_back.taken < 8 * (len(back.rows) + len(back.lengths)) + 50 * 2**20
