"""alit encode, decode and info, from photographs to pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from alit import FixedLength, MaxL1, TokenSequence
from alit.images import load, to_image
from tests.helpers.commands import refused, run, text
from tests.helpers.models import images, model

FILE, OUT = Path("x.alit"), Path("out")


@pytest.fixture(autouse=True)
def photos(here: Path) -> None:
    """Three pictures of different shapes."""
    Path("photos").mkdir()
    for name, size, image in zip("bac", ((24, 16), (60, 40), (40, 60)), images(), strict=True):
        to_image(image).resize(size).save(f"photos/{name}.png")


def write(lengths: list[int]) -> None:
    tokens = TokenSequence(torch.tensor(lengths), indices=torch.zeros(sum(lengths)).long())
    FILE.write_bytes(tokens.to_bytes(model().identity()))


def test_encode_decode_info() -> None:
    done = run("encode", "photos", "-o", FILE, "--max-l1", 0.3)
    assert done.exit_code == 0, done.output
    assert "3 images" in done.output and "bits per pixel" in done.output
    m = model()
    pictures = torch.stack([load(f"photos/{name}.png", (16, 24)) for name in "abc"])
    expected = m.encode(pictures, MaxL1(0.3))
    tokens = TokenSequence.from_bytes(FILE.read_bytes(), m.identity())
    assert torch.equal(tokens.lengths, expected.lengths)

    done = run("info", FILE)
    said = done.output.replace("\n", " ")
    assert done.exit_code == 0 and m.identity().fingerprint.hex()[:12] in said
    assert f"{8 * FILE.stat().st_size / (3 * 16 * 24):.4f} bits per pixel" in said
    assert "pictures of 24x16" in said and "32 codes of 5 bits" in said
    assert all(str(length) in said for length in tokens.lengths.tolist())

    done = run("decode", FILE, "-o", OUT)
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir(OUT)) == ["00000.png", "00001.png", "00002.png"]
    for b, pixels in enumerate(m.decode(tokens)):
        with Image.open(OUT / f"{b:05}.png") as picture:
            assert picture.size == (24, 16)
            assert picture.tobytes() == to_image(pixels).tobytes()


def test_decode_beside_pictures_of_another_file() -> None:
    OUT.mkdir()
    for name in ("2024.png", "123456a.png"):  # of nobody's file
        (OUT / name).touch()
    for lengths in ([3, 3], [3, 3], [3, 3, 3]):
        write(lengths)
        assert run("decode", FILE, "-o", OUT).exit_code == 0
    write([3, 3])
    refused(run("decode", FILE, "-o", OUT), "holds more pictures, of another file")


def test_criteria_and_files() -> None:
    photo = Path("photos/b.png")
    for option, value, length in (("--tokens", 6, 6), ("--code-error", 0.0, 12)):
        done = run("encode", photo, photo, "-o", FILE, option, value)
        assert done.exit_code == 0, done.output
        assert TokenSequence.from_bytes(FILE.read_bytes()).lengths.tolist() == [length] * 2
    expected = model().encode(load(photo, (16, 24))[None], FixedLength(12))
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


def test_info_shows_some_of_many_lengths() -> None:
    write(list(range(1000)))
    done = run("info", FILE)
    assert "744 lengths more" in done.output and len(done.output.splitlines()) < 300


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "photos", "link"])
@pytest.mark.parametrize("command", ["info", "decode", "convert", "export"])
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
