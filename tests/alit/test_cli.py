"""The command line, the demo and picture files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from alit.base import DCTBase
from alit.cli import app
from alit.config import DCTConfig
from alit.demo import PHOTOGRAPHS, photographs
from alit.images import load_square, save_image, to_image


def test_help_lists_commands() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0 and "demo" in done.output and "convert" in done.output


def test_demo_writes_its_pictures(tmp_path: Path) -> None:
    """Two seconds of training: the pictures are there; that they are good takes minutes."""
    output = tmp_path / "pictures"
    done = CliRunner().invoke(
        app, ["demo", "--output", str(output), "--seconds", "2", "--image-size", "32"]
    )
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir(output)) == ["error.png", "loss.png", "reconstructions.png"]
    assert str(output) in done.output.replace("\n", "")
    sheet = Image.open(output / "reconstructions.png")
    assert sheet.width > 9 * 32 and sheet.height > len(PHOTOGRAPHS) * 32


def test_demo_errors_have_no_traceback(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for arguments, message in (
        (["--output", str(taken)], "File exists"),
        (["--output", str(tmp_path), "--image-size", "100"], "image_size: expected"),
    ):
        done = CliRunner().invoke(app, ["demo", "--seconds", "1", *arguments])
        assert done.exit_code == 1 and "error: " in done.output and message in done.output
        assert "Traceback" not in done.output


def test_pictures_of_any_mode_and_orientation(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"):
        file = path.with_suffix(".tiff") if mode in ("CMYK", "I;16") else path
        Image.new(mode, (30, 20)).save(file)
        assert load_square(file, 16).shape == (3, 16, 16)
    sideways = Image.new("RGB", (20, 10), "black")
    sideways.paste("white", (0, 0, 20, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the white top becomes the right half
    sideways.save(tmp_path / "x.jpg", exif=exif)
    turned = load_square(tmp_path / "x.jpg", 10)
    assert turned[:, :, 7:].mean() > 0.9 and turned[:, :, :3].mean() < 0.1
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="identify"):
        load_square(tmp_path / "no.png", 16)


def test_rounding_and_atomic_pictures(tmp_path: Path) -> None:
    image = to_image(torch.tensor([-1.0, 0.4999, 2.0])[:, None, None].expand(3, 2, 2))
    assert image.getpixel((0, 0)) == (0, 127, 255)
    save_image(image, tmp_path / "x.png")
    assert os.listdir(tmp_path) == ["x.png"]


def test_dct_reconstructs() -> None:
    """All coefficients give the picture back; few give its low frequencies; the scale suits photographs."""
    images = torch.stack(list(photographs(64).values()))
    everything = DCTBase(DCTConfig(patch_size=8, luma=64, chroma=64))
    code = everything.encode(images).code_BNC
    torch.testing.assert_close(everything.pixels(code, (8, 8)), images, atol=1e-4, rtol=0)
    few = DCTBase(DCTConfig(patch_size=8, luma=6, chroma=3))
    tokens = few.encode(images)
    blurred = few.pixels(tokens.code_BNC, (8, 8))
    assert 0.01 < (blurred - images).abs().mean() < 0.08
    again = few.encode(blurred).code_BNC
    torch.testing.assert_close(again, tokens.code_BNC, atol=1e-4, rtol=0)
    assert 0.5 < tokens.code_BNC[..., 0].std() < 2
