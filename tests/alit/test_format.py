""".alit data: round trip, the documented bytes, and damaged or hostile data.

``ALIT_FUZZ_EXAMPLES`` sets the number of mutations (500 by default; ``make test-full`` runs 20,000).
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alit import FormatError, ModelIdentity, TokenSequence, alit_format
from alit.alit_format import HEADER, Reader, dump
from alit.atomic_files import reading
from alit.cli import app
from alit.image_records import file_name
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


#: Names, sizes and padding of the images of test_damaged_data.
SAID: dict[str, Any] = {
    "names": ["a.jpg", "", "写真.png", "x" * 255],
    "originals": [(4000, 3000), (0, 0), (1, 2**32 - 1), (16, 24)],
    "padding": [(0, 0), (15, 3), (191, 0), (0, 0)],
}


def sized(codes: int = 4096) -> TokenSequence:
    sizes = torch.tensor([[16, 24], [256, 192], [192, 2**32 - 1], [1, 1]])
    tokens = sequence([32, 0, 7, 64], codes)
    return TokenSequence(tokens.lengths, indices=tokens.indices, sizes=sizes)


@pytest.mark.parametrize("codes", (1, 255, 4096))
@pytest.mark.parametrize("given", ([], ["names"], ["originals", "padding"], list(SAID)))
def test_round_trip_of_version_2(codes: int, given: list[str]) -> None:
    tokens, said = sized(codes), {name: SAID[name] for name in given}
    data = tokens.to_bytes(identity(codes), **said)
    back = TokenSequence.from_bytes(data, identity(codes))
    assert torch.equal(back.rows, tokens.rows) and torch.equal(back.lengths, tokens.lengths)
    assert torch.equal(back.sizes, tokens.sizes)
    names = said.get("names", [""] * 4)
    bits = max(1, (codes - 1).bit_length())
    stored = sum(len(name.encode()) for name in names)
    assert len(data) == 56 + 21 * 4 + stored + (103 * bits + 7) // 8
    reader = Reader(io.BytesIO(data))
    nothing = [(0, 0)] * 4
    for first, count in ((0, 4), (0, 0), (1, 2), (3, 1), (4, 0)):
        here = slice(first, first + count)
        images = reader.images(first, count)
        assert list(images.names) == names[here]
        assert images.sizes.tolist() == reader.sizes(first, count).tolist()
        assert images.sizes.tolist() == tokens.sizes[here].tolist()
        for values, name in ((images.originals, "originals"), (images.padding, "padding")):
            assert [tuple(x) for x in values.tolist()] == said.get(name, nothing)[here]
    assert reader.pixels == sum(height * width for height, width in tokens.sizes.tolist())


def test_bytes_of_version_2_are_the_documented_ones() -> None:
    m = ModelIdentity(bytes(16), 4096, (256, 256))
    tokens = TokenSequence(
        torch.tensor([1]), indices=torch.tensor([7]), sizes=torch.tensor([[16, 24]])
    )
    data = tokens.to_bytes(m, names=["a.jpg"], originals=[(160, 240)], padding=[(0, 2)])
    assert data == second(padding=(0, 2))


def test_the_version_is_the_first_that_can_say_it() -> None:
    """Data have the earliest version that can hold them; version 1 is read with the size in its header."""
    tokens, own = sequence([3, 1], 32), torch.tensor([[256, 192]] * 2)
    data = tokens.to_bytes(identity(32))
    assert data[8:10] == b"\1\0"
    same = TokenSequence(tokens.lengths, indices=tokens.indices, sizes=own)
    assert same.to_bytes(identity(32)) == data
    assert same.to_bytes(identity(32), names=["", "x"])[8:10] == b"\2\0"
    assert torch.equal(TokenSequence.from_bytes(data).sizes, own)
    images = Reader(io.BytesIO(data)).images(0, 2)
    assert images.names == ["", ""] and images.sizes.tolist() == own.tolist()
    assert images.originals.tolist() == images.padding.tolist() == [[0, 0]] * 2


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"names": ["a"]}, r"names: expected one per image \(4\), got 1"),
        ({"names": ["a", "b", "c", "d/e"]}, "names: expected those of files, .* got 'd/e'"),
        ({"names": ["a", "b", "c", "x" * 256]}, "names: expected those of files"),
        ({"names": ["a", "b", "c", "\udcff"]}, "names: expected those of files"),
        ({"originals": [(1, 2)]}, r"original: expected shape \(4, 2\), got \(1, 2\)"),
        ({"originals": [(1, 2**32)] * 4}, "original: expected 0 to 4294967295, got 1 to 4294967"),
        ({"originals": [(1, 0)] * 4}, "original: expected height and width, or 0 for both"),
        ({"padding": [(-1, 0)] * 4}, "padding: expected 0 to 255, got -1 to 0"),
        ({"padding": [(1, 0)] * 4}, "padding: expected less than the size, got as much"),
    ],
)
def test_what_version_2_cannot_say(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sized().to_bytes(identity(), **said)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("IMG_1.jpg", "IMG_1.jpg"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("two\nlines\x1b[31m", "two_lines_[31m"),
        ("\u202egpj", "_gpj"),
        ("byte\udcff", "byte_"),
        ("..", "_"),
        ("é" * 200, "é" * 127),
        ("写真.png", "写真.png"),
    ],
)
def test_names_as_files_hold_them(name: str, kept: str) -> None:
    assert file_name(name) == kept == file_name(kept)
    assert len(kept.encode()) <= 255


def test_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are read correctly in blocks of any size."""
    names = [f"{number}.jpg" for number in range(50)]
    tokens = sequence([1] * 50, 32)
    data = tokens.to_bytes(identity(32), names=names)
    monkeypatch.setattr(alit_format, "FEW", 7)
    reader = Reader(io.BytesIO(data))
    for first, count in ((0, 50), (6, 1), (7, 1), (13, 30), (49, 1), (50, 0)):
        assert list(reader.images(first, count).names) == names[first : first + count]


def with_checksum(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def header(codes: int = 4096, count: int = 1, tokens: int = 1, version: int = 1) -> bytes:
    return HEADER.pack(
        *(b"\x89ALIT\r\n\x1a", version, 0, bytes(16), codes, 256, 256, count, tokens)
    )


def second(
    *,
    size: tuple[int, int] = (16, 24),
    original: tuple[int, int] = (160, 240),
    padding: tuple[int, int] = (0, 0),
    name: bytes = b"a.jpg",
    said: int | None = None,
    total: int | None = None,
) -> bytes:
    """Data of version 2 with one image of one token, byte by byte."""
    body = header(version=2) + struct.pack("<I", len(name) if total is None else total)
    body += struct.pack("<H4I", 1, *size, *original)
    body += bytes([*padding, len(name) if said is None else said]) + name + b"\x07\x00"
    return with_checksum(body)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an .alit file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "not an .alit file"),
        (with_checksum(header(version=3)), "version: expected 1 or 2, got 3; written by a later"),
        (with_checksum(header(version=0)), "version: expected 1 or 2, got 0"),
        (with_checksum(header(version=2)), "truncated or damaged: 1 images"),
        (second(total=2**32 - 1), "truncated or damaged: 1 images with 1 tokens take 4294967"),
        (second(total=0), "truncated or damaged: 1 images"),
        (second(said=4), "names: expected them to end where the indices begin"),
        (second(said=255), "names: expected them to end where the indices begin"),
        (second(name=b"\xff.jpg"), "names: expected UTF-8"),
        (second(name=b"../a.jpg"), "names: expected those of files, without paths and controls"),
        (second(name=b"/etc/passwd"), r"without paths and controls, got '/etc/passwd'"),
        (second(name=b"C:\\a.jpg"), "names: expected those of files"),
        (second(name=b"a:b"), "names: expected those of files"),
        (second(name=b".."), "names: expected those of files"),
        (second(name=b"a\x00b"), "names: expected those of files"),
        (second(name=b"\x1b[31m"), r"got '\\x1b\[31m'"),
        (second(name="\u202egpj".encode()), r"got '\\u202egpj'"),
        (second(name="\x85".encode()), r"names: expected those of files"),
        (second(size=(0, 24)), "size: expected at least 1, got 0"),
        (second(padding=(16, 0)), "padding: expected less than the size"),
        (second(original=(0, 7)), "original: expected height and width, or 0 for both"),
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
    """Hostile data, huge counts included, raise FormatError at once, in little memory."""
    with memory(most=4e6, seconds=1), pytest.raises(FormatError, match=message):
        TokenSequence.from_bytes(data)


def test_damaged_data(tmp_path: Path) -> None:
    """Any damage raises FormatError; with a corrected checksum data are read as a valid file or raise it."""
    rng, path = random.Random(0), tmp_path / "x.alit"
    sources = [
        sequence([32, 0, 7, 64], codes).to_bytes(identity(codes), **options)
        for codes in (1, 4000, 2**31)
        for options in ({}, SAID)
    ]
    for number in range(EXAMPLES):
        valid = sources[number % len(sources)]
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
    """Bytes of a file that was read ``step`` tokens at a time and written again."""
    with reading(source) if isinstance(source, Path) else source as file:
        reader = Reader(file)
        places = range(0, reader.token_count, step)
        parts = [reader.indices(place, min(step, reader.token_count - place)) for place in places]
        lengths = reader.lengths(0, reader.image_count)
        images = reader.images(0, reader.image_count) if reader.version == 2 else None
    assert sum(reader.histogram.values()) == len(lengths)
    indices = np.concatenate([np.zeros(0, np.int64), *parts])
    return dump(reader.identity, lengths, indices, images)


@pytest.mark.parametrize("codes", [2, 5, 4096])
def test_blocks_of_any_size(codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing do not depend on the size of blocks."""
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
