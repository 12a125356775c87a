"""alit encode, decode and info, from photographs to images."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alit import FixedLength, MaxL1, TokenSequence, fitting
from alit.alit_format import Reader
from alit.atomic_files import reading
from alit.fitting import most_tokens
from alit.images import load, to_image
from tests.helpers.commands import refused, run, text
from tests.helpers.models import images, model

FILE, OUT = Path("x.alit"), Path("out")


@pytest.fixture(autouse=True)
def photos(here: Path) -> None:
    """Write three images of different shapes to ``photos``."""
    Path("photos").mkdir()
    for name, size, image in zip("bac", ((24, 16), (60, 40), (40, 60)), images(), strict=True):
        to_image(image).resize(size).save(f"photos/{name}.png")


def write(lengths: list[int]) -> None:
    counts = torch.tensor(lengths, dtype=torch.int64)
    tokens = TokenSequence(counts, indices=torch.zeros(sum(lengths)).long())
    FILE.write_bytes(tokens.to_bytes(model().identity()))


#: Encoded sizes of a, b and c, (width, height), and sizes of the encoded part in the original.
ENCODED = {
    "whole": ([(24, 16), (24, 16), (16, 24)], [(60, 40), (24, 16), (40, 60)]),
    "crop": ([(24, 16)] * 3, [(60, 40), (24, 16), (40, 27)]),
    "pad": ([(24, 16), (24, 16), (16, 24)], [(60, 40), (24, 16), (40, 60)]),
}


@pytest.mark.parametrize("fit", ENCODED)
def test_encode_decode_info(fit: str) -> None:
    done = run("encode", "photos", "-o", FILE, "--max-l1", 0.3, "--fit", fit)
    assert done.exit_code == 0, done.output
    assert "3 images" in done.output and "bits per pixel" in done.output
    m = model()
    fitted = [fitting.load(f"photos/{name}.png", (16, 24), 4, fit) for name in "abc"]
    if fit == "crop":
        for name, x in zip("abc", fitted, strict=True):
            assert torch.equal(x.image, load(f"photos/{name}.png", (16, 24)))
    expected = m.encode([x.image for x in fitted], MaxL1(0.3))
    tokens = TokenSequence.from_bytes(FILE.read_bytes(), m.identity())
    assert torch.equal(tokens.lengths, expected.lengths)
    assert torch.equal(tokens.sizes, expected.sizes)
    encoded, originals = ENCODED[fit]
    assert tokens.sizes.tolist() == [[height, width] for width, height in encoded]

    done = run("info", FILE)
    said = done.output.replace("\n", " ")
    assert done.exit_code == 0 and m.identity().fingerprint.hex()[:12] in said
    assert f"{8 * FILE.stat().st_size / (3 * 16 * 24):.4f} bits per pixel" in said
    assert "images of 24x16" in said and "32 codes of 5 bits" in said and "version 2" in said
    assert all(str(length) in said for length in tokens.lengths.tolist())

    about = json.loads(run("info", FILE, "--json").output)
    images = about.pop("each")
    assert [x["name"] for x in images] == ["a.png", "b.png", "c.png"]
    assert [x["encoded"] for x in images] == tokens.sizes.tolist()
    assert [x["original"][::-1] for x in images] == list(map(list, originals))
    assert [x["tokens"] for x in images] == tokens.lengths.tolist()
    assert sum(about.pop("lengths").values()) == 3
    size, count = FILE.stat().st_size, int(tokens.lengths.sum())
    assert about == {
        **{"version": 2, "model": m.identity().fingerprint.hex(), "codebook_size": 32},
        **{"bits_per_token": 5, "image_size": [16, 24], "images": 3, "tokens": count},
        **{"tokens_per_image": count / 3, "bytes": size},
        "bits_per_pixel": 8 * size / (3 * 16 * 24),
    }
    for name, (width, height), shape in zip("abc", originals, encoded, strict=True):
        row = next(line for line in done.output.splitlines() if f"{name}.png" in line)
        assert f"{width}x{height}" in row and f"{shape[0]}x{shape[1]}" in row

    done = run("decode", FILE, "-o", OUT)
    assert done.exit_code == 0, done.output
    done = run("decode", FILE, "-o", "small", "--encoded-size")
    assert done.exit_code == 0, done.output
    for folder in (OUT, Path("small")):
        assert sorted(os.listdir(folder)) == ["a.png", "b.png", "c.png"]
    for b, (name, pixels) in enumerate(zip("abc", m.decode(tokens), strict=True)):
        with Image.open(f"small/{name}.png") as image:
            assert image.tobytes() == to_image(pixels).tobytes()
            large = image.resize(originals[b], Image.Resampling.BICUBIC)
        with Image.open(OUT / f"{name}.png") as image:
            assert image.size == originals[b] and image.tobytes() == large.tobytes()


def test_padding_is_taken_away() -> None:
    """Decoding removes the padding to whole patches and restores a small image's size."""
    Image.effect_noise((13, 10), 50).convert("RGB").save("small.png")
    assert run("encode", "small.png", "-o", FILE, "--tokens", 3, "--fit", "pad").exit_code == 0
    with reading(FILE) as file:
        images = Reader(file).images(0, 1)
    assert images.sizes.tolist() == [[12, 16]] and images.padding.tolist() == [[2, 3]]
    assert run("decode", FILE, "-o", OUT).exit_code == 0
    tokens = TokenSequence.from_bytes(FILE.read_bytes())
    with Image.open(OUT / "small.png") as image:
        expected = to_image(model().decode(tokens)[0, :, :10, :13])
        assert image.size == (13, 10) and image.tobytes() == expected.tobytes()


def write_named(*names: str, originals: tuple[int, int] = (16, 24), size: int = 16) -> None:
    lengths = [3] * len(names)
    tokens = TokenSequence(
        torch.tensor(lengths),
        indices=torch.zeros(sum(lengths)).long(),
        sizes=torch.tensor([[size, 24]] * len(names)),
    )
    data = tokens.to_bytes(model().identity(), names=names, originals=[originals] * len(names))
    FILE.write_bytes(data)


def test_names_of_decoded_images() -> None:
    """Decoded images are named like originals, with numbers for duplicates, within the folder, replacing no file."""
    long = "x" * 251 + ".jpg"
    names = [
        "a.jpg",
        "a.png",
        "A.gif",
        "",
        "a.b.jpg",
        ".x",
        "...",
        "é.jpg",
        long,
        long,
        "00003.jpg",
    ]
    write_named(*names)
    OUT.mkdir()
    (OUT / "mine.png").write_text("x")
    assert run("decode", FILE, "-o", OUT).exit_code == 0
    stems = ["a", "a-2", "A-3", "00003", "a.b", ".x", "...", "é", "00003-2", "mine"]
    stems += ["x" * 240, "x" * 240 + "-2"]
    assert sorted(os.listdir(OUT)) == sorted(f"{stem}.png" for stem in stems)
    before = {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    refused(run("decode", FILE, "-o", OUT), "a.png is there already; choose another folder, or")
    assert before == {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    assert run("decode", FILE, "-o", OUT, "--overwrite").exit_code == 0
    (OUT / "a.png").unlink()
    (OUT / "a.png").symlink_to("/nowhere")
    refused(run("decode", FILE, "-o", OUT), "a.png is there already")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"originals": (2**16, 2**12)}, "at most 250 megapixels and sides .* 4096 x 65536; --enc"),
        ({"originals": (1, 2**20 + 1)}, "sides of at most 1048576 pixels, got 1048577 x 1"),
        ({"size": 18}, "size: expected sides of at least 4 pixels, .* got 18 x 24"),
        ({"size": 4 * 65}, "size: expected at most 384 patches .* got 260 x 24 with 390"),
    ],
)
def test_sizes_that_are_not_decoded(options: dict[str, Any], message: str) -> None:
    write_named("a.png", **options)
    done = run("decode", FILE, "-o", OUT)
    assert done.exit_code == 1 and re.search(message, text(done)) and not OUT.exists()
    assert run("info", FILE).exit_code == 0
    if "originals" in options:
        assert run("decode", FILE, "-o", OUT, "--encoded-size").exit_code == 0


def test_a_hostile_name_is_refused() -> None:
    write_named("aaaaaaaaa.png")
    body = FILE.read_bytes()[:-4].replace(b"aaaaaaaaa.png", b"../../../.png")
    FILE.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    for command in (("info", FILE), ("decode", FILE, "-o", OUT)):
        refused(run(*command), "names: expected those of files, without paths and controls")
    assert not OUT.exists()


def test_version_1_is_read() -> None:
    """Version 1 is read: images get numbers for names, and the model's size."""
    write([3, 6])
    assert FILE.read_bytes()[8] == 1
    done = run("info", FILE)
    assert done.exit_code == 0 and "version 1" in text(done)
    assert run("decode", FILE, "-o", OUT).exit_code == 0
    assert sorted(os.listdir(OUT)) == ["00000.png", "00001.png"]
    with Image.open(OUT / "00001.png") as image:
        assert image.size == (24, 16)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 3000), (70_000, 1), (2, 5000)])
@pytest.mark.parametrize("fit", ["whole", "crop", "pad"])
def test_small_and_long_images(size: tuple[int, int], fit: str) -> None:
    """Images smaller than a patch or a thousand times as long as high get a usual number of tokens, and their size."""
    Image.new("RGB", size, (10, 200, 30)).save("odd.png")
    done = run("encode", "odd.png", "photos", "-o", FILE, "--tokens", 3, "--fit", fit)
    assert done.exit_code == 0, done.output
    tokens = TokenSequence.from_bytes(FILE.read_bytes())
    assert (tokens.sizes.prod(1) // 16).max() <= most_tokens(24)
    assert run("decode", FILE, "-o", OUT).exit_code == 0
    if fit != "crop":
        with Image.open(OUT / "odd.png") as image:
            assert image.size == size


def test_decode_beside_images_of_another_file() -> None:
    OUT.mkdir()
    for name in ("2024.png", "123456a.png"):  # not names made by the command
        (OUT / name).touch()
    for lengths in ([3, 3], [3, 3], [3, 3, 3]):
        write(lengths)
        assert run("decode", FILE, "-o", OUT).exit_code == 0
    write([3, 3])
    refused(run("decode", FILE, "-o", OUT), "holds more images, of another file")


def test_criteria_and_files() -> None:
    photo = Path("photos/b.png")
    for option, value, length in (("--tokens", 6, 6), ("--code-error", 0.0, 12)):
        done = run("encode", photo, photo, "-o", FILE, option, value)
        assert done.exit_code == 0, done.output
        assert TokenSequence.from_bytes(FILE.read_bytes()).lengths.tolist() == [length] * 2
    whole = fitting.load(photo, (16, 24), 4, "whole").image
    expected = model().encode([whole], FixedLength(12))
    assert torch.equal(TokenSequence.from_bytes(FILE.read_bytes())[0].rows, expected.rows)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            [0] * 65_535,
            "lengths: expected 1 to 12 tokens, as the model makes them, got 0 in 65535 of",
        ),
        ([3, 0, 3], "got 0 in 1 of 3 images"),
        ([3, 13], "got 13 in 1 of 2 images"),
        ([1] * 100_001, "images: expected at most 100000 to decode, got 100001"),
    ],
)
def test_what_no_encoder_makes_is_not_decoded(lengths: list[int], message: str) -> None:
    write(lengths)
    refused(run("decode", FILE, "-o", OUT), message)
    assert not OUT.exists()
    assert run("info", FILE).exit_code == 0


def test_info_shows_ranges_of_many_lengths() -> None:
    write([*range(100), *range(30, 60), *range(200, 300), 800])
    shown = run("info", FILE).output.splitlines()
    rows = [line.replace("\u2502", " ").split() for line in shown if "-" in line]
    assert ["0-100", "130", "#" * 40] in rows and ["101-201", "2", "#"] in rows
    assert ["202-302", "98", "#" * 30] in rows and ["303-403", "0"] in rows
    assert ["707-800", "1", "#"] in rows and len(rows) == 8


def test_json_says_all_of_many_and_of_none() -> None:
    """--json of ``info`` lists all images, also of files without names and sizes, and of empty files."""
    write(list(range(300)))
    about = json.loads(run("info", FILE, "--json").output)
    assert len(about["lengths"]) == len(about["each"]) == 300 and about["version"] == 1
    unknown = {"name": None, "original": None, "encoded": [16, 24], "tokens": 299}
    assert about["each"][-1] == unknown
    write([])
    about = json.loads(run("info", FILE, "--json").output)
    assert about["images"] == 0 and about["bits_per_pixel"] is about["tokens_per_image"] is None


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "photos", "link"])
@pytest.mark.parametrize("command", ["info", "decode", "convert", "compact"])
def test_only_files_are_read(command: str, path: str) -> None:
    """An endless device and a pipe without a writer are refused at once."""
    os.mkfifo("pipe")
    Path("link").symlink_to("/dev/zero")
    options = {"decode": ["-o", OUT], "info": []}
    done = run(command, path, *options.get(command, ["x.safetensors"]))
    assert done.exit_code in (1, 2) and "Traceback" not in done.output
    assert "expected a file, found" in text(done) or "is a directory" in done.output
    assert not OUT.exists() and not Path("x.safetensors").exists()


def test_continuous_model_is_refused() -> None:
    model(bottleneck="continuous").save_pretrained("weights/nano.safetensors")
    refused(run("encode", "photos", "-o", FILE), "expected one that gives indices")
