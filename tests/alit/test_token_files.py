"""alit encode, decode and info, from photographs to pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from alit import FixedLength, MaxL1, TokenSequence
from alit.cli import app
from alit.images import load, to_image
from tests.helpers.models import images, model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of different shapes, a text file and a folder; two models."""
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    (photos / "notes.txt").write_text("no picture")
    for name, size, image in zip("bac", ((24, 16), (60, 40), (40, 60)), images(), strict=True):
        to_image(image).resize(size).save(photos / f"{name}.png")
    model().save_pretrained(tmp_path / "model.safetensors")
    model(seed=1).save_pretrained(tmp_path / "other.safetensors")
    return tmp_path


def test_encode_decode_info(folder: Path) -> None:
    file, weights = folder / "x.alit", folder / "model.safetensors"
    done = run("encode", folder / "photos", "-o", file, "--model", weights, "--max-l1", 0.3)
    assert done.exit_code == 0, done.output
    assert "3 images" in done.output and "bits per pixel" in done.output
    m = model()
    pictures = torch.stack([load(folder / "photos" / f"{name}.png", (16, 24)) for name in "abc"])
    expected = m.encode(pictures, MaxL1(0.3))
    tokens = TokenSequence.from_bytes(file.read_bytes(), m.identity())
    assert torch.equal(tokens.lengths, expected.lengths)

    done = run("info", file)
    text = done.output.replace("\n", " ")
    assert done.exit_code == 0 and m.identity().fingerprint.hex()[:12] in text
    assert f"{8 * file.stat().st_size / (3 * 16 * 24):.4f} bits per pixel" in text
    assert "pictures of 24x16" in text and "32 codes of 5 bits" in text
    assert all(str(length) in text for length in tokens.lengths.tolist())

    done = run("decode", file, "-o", folder / "out", "--model", weights)
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir(folder / "out")) == ["00000.png", "00001.png", "00002.png"]
    for b, pixels in enumerate(m.decode(tokens)):
        with Image.open(folder / "out" / f"{b:05}.png") as picture:
            assert picture.size == (24, 16)
            assert picture.tobytes() == to_image(pixels).tobytes()


def test_decode_beside_pictures_of_another_file(folder: Path) -> None:
    m = model()
    file, weights, out = folder / "x.alit", folder / "model.safetensors", folder / "out"
    out.mkdir()
    for name in ("2024.png", "123456a.png"):  # of nobody's file
        (out / name).touch()
    for count, code in ((2, 0), (2, 0), (3, 0), (2, 1)):
        file.write_bytes(m.encode(images()[:count], FixedLength(3)).to_bytes(m.identity()))
        done = run("decode", file, "-o", out, "--model", weights)
        assert done.exit_code == code, done.output
    assert "holds more pictures, of another file" in done.output.replace("\n", "")


def test_criteria_and_files(folder: Path) -> None:
    file, weights = folder / "x.alit", folder / "model.safetensors"
    photo = folder / "photos" / "b.png"
    for option, lengths in (("--tokens", [6, 6]), ("--code-error", [12, 12])):
        value = 6 if option == "--tokens" else 0.0
        done = run("encode", photo, photo, "-o", file, "--model", weights, option, value)
        assert done.exit_code == 0, done.output
        assert TokenSequence.from_bytes(file.read_bytes()).lengths.tolist() == lengths
    expected = model().encode(load(photo, (16, 24))[None], FixedLength(12))
    assert torch.equal(TokenSequence.from_bytes(file.read_bytes())[0].rows, expected.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode nowhere -o x.alit --model model.safetensors", "nowhere: no such file or folder"),
        ("encode photos/inner -o x.alit --model model.safetensors", "no picture found"),
        (
            "encode photos/notes.txt -o x.alit --model model.safetensors",
            "notes.txt: not a readable",
        ),
        ("encode photos -o no/x.alit --model model.safetensors", "no: no such folder"),
        ("encode photos -o x.alit --model model.safetensors --tokens 4", "expected multiples of 3"),
        ("encode photos -o x.alit --model m --tokens 3 --max-l1 1", "expected one of --max-l1"),
        ("encode photos -o x.alit --model none", "no such file, nor the name of"),
        ("decode photos/b.png -o out --model model.safetensors", "not an .alit file"),
        ("decode missing.alit -o out --model model.safetensors", "No such file"),
        ("decode good.alit -o out --model other.safetensors", "written by another model"),
        ("info photos/b.png", "not an .alit file"),
        ("info cut.alit", "truncated or damaged"),
    ],
)
def test_errors_have_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    m = model()
    data = m.encode(images(), FixedLength(3)).to_bytes(m.identity())
    Path("good.alit").write_bytes(data)
    Path("cut.alit").write_bytes(data[:-9])
    done = run(*arguments.split())
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert message in done.output.replace("\n", "")
    assert not Path("x.alit").exists() and not Path("out").exists()


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
def test_what_no_encoder_makes_is_not_decoded(
    folder: Path, lengths: list[int], message: str
) -> None:
    file, out = folder / "x.alit", folder / "out"
    tokens = TokenSequence(torch.tensor(lengths), indices=torch.zeros(sum(lengths)).long())
    file.write_bytes(tokens.to_bytes(model().identity()))
    done = run("decode", file, "-o", out, "--model", folder / "model.safetensors")
    assert done.exit_code == 1 and message in done.output.replace("\n", "")
    assert not out.exists()
    assert run("info", file).exit_code == 0


def test_info_shows_some_of_many_lengths(folder: Path) -> None:
    lengths = torch.arange(1000)
    tokens = TokenSequence(lengths, indices=torch.zeros(int(lengths.sum())).long())
    (folder / "x.alit").write_bytes(tokens.to_bytes(model().identity()))
    done = run("info", folder / "x.alit")
    assert "744 lengths more" in done.output and len(done.output.splitlines()) < 300


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "photos", "link"])
@pytest.mark.parametrize("command", ["info", "decode", "convert", "export"])
def test_only_files_are_read(
    folder: Path, command: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless device and a pipe without a writer are refused at once."""
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    Path("link").symlink_to("/dev/zero")
    options = {"decode": ["-o", "out", "--model", "model.safetensors"], "info": []}
    done = run(command, path, *options.get(command, ["x.safetensors"]))
    assert done.exit_code in (1, 2) and "Traceback" not in done.output
    assert "expected a file, found" in done.output or "is a directory" in done.output
    assert not Path("out").exists() and not Path("x.safetensors").exists()


def test_continuous_model_is_refused(folder: Path) -> None:
    model(bottleneck="continuous").save_pretrained(folder / "model.safetensors")
    done = run(
        "encode",
        folder / "photos",
        "-o",
        folder / "x.alit",
        "--model",
        folder / "model.safetensors",
    )
    assert done.exit_code == 1 and "expected one that gives indices" in done.output
