"""The command line, except images, folders, token files and alit demo, which have tests of their own."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image, ImageFile

import alit
from alit import AdaptiveTokenizer, FixedLength, fitting
from alit.base import DCTBase
from alit.base_config import DCTConfig
from alit.cli import COMMANDS
from alit.console import errors
from alit.demo import photographs
from alit.images import load, load_square, save_image, to_image
from tests.helpers.commands import refused, run, text
from tests.helpers.models import images, model


@pytest.fixture
def folder(here: Path) -> Path:
    """Working folder: photos with three images, notes.txt, cut.png, token files, an empty folder, another model."""
    for name in ("photos", "empty"):
        (here / name).mkdir()
    for name, size, image in zip("abc", ((24, 16), (60, 40), (40, 60)), images(), strict=True):
        to_image(image).resize(size).save(f"photos/{name}.png")
    Path("notes.txt").write_text("no image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:5000])
    m = model()
    tokens = m.encode(images(), FixedLength(3)).to_bytes(m.identity())
    Path("good.alit").write_bytes(tokens)
    Path("cut.alit").write_bytes(tokens[:-9])
    model(seed=1).save_pretrained("other.safetensors")
    return here


def test_help_teaches() -> None:
    """Each command has a module of its name, a line in the list of commands, and help with an example."""
    done = run("--help")
    assert done.exit_code == 0 and "alit reconstruct photo.jpg" in done.output
    for name, summary in COMMANDS.items():
        assert f" {name} " in done.output
        command = getattr(importlib.import_module(f"alit.commands.{name}"), name)
        assert command.__doc__.startswith(summary), name
        shown = run(name, "--help")
        assert shown.exit_code == 0, shown.output
        assert f"     alit {name} " in shown.output, name  # indented
        assert name in ("info", "convert", "compact", "export") or "--device" in shown.output, name
    assert "torchrun --nproc-per-node" in run("train", "--help").output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_all_that_is_written(name: str) -> None:
    """No word of a command's docstring is lost as markup, as brackets would be."""
    command = getattr(importlib.import_module(f"alit.commands.{name}"), name)
    shown = run(name, "--help").output.split()
    assert set(command.__doc__.split()) - set(shown) == set()


@pytest.mark.parametrize("limit", ["--max-l1 nan", "--max-l1 6", "--max-l1 -1", "--relative-l1 35"])
def test_limits_that_are_none(limit: str, folder: Path) -> None:
    """Limits outside of their range, such as percent, are refused by the option's name."""
    done = run("encode", "photos", "-o", "x.alit", *limit.split())
    assert done.exit_code == 2 and f"'{limit.split()[0]}'" in done.output
    assert not Path("x.alit").exists()


def test_train_says_where_it_starts(folder: Path) -> None:
    """``train`` says that it starts from random weights if there is no stage-1 model or no checkpoint to resume."""
    options = ("--data", "photos", "--output", "out", "--perceptual", "off", "--image-size", 64)
    done = run("train", "--stage", 2, "--base", "dct", *options)
    assert done.exit_code == 1 and "data: expected at least a batch" in text(done)
    assert "stage 2 without --start-from: from random weights" in text(done)
    done = run("train", "--base", "dct", *options, "--resume")
    assert "out: no checkpoint there; from the beginning" in text(done)


def test_version_and_usage() -> None:
    done = run("--version")
    assert done.exit_code == 0 and done.output == f"alit {alit.__version__}\n"
    assert run("evaluate").exit_code == 2  # the model is missing
    done = run("recontsruct")
    assert done.exit_code == 2 and "Did you mean 'reconstruct'?" in done.output


@pytest.mark.parametrize("module", ["alit", "alit.cli"])
def test_module_runs(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line runs as ``python -m MODULE``."""
    monkeypatch.setattr(sys, "argv", [module, "info", "good.alit"])
    monkeypatch.delitem(sys.modules, "alit.cli")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert "3 images" in capsys.readouterr().out


def test_train_takes_the_name_of_a_configuration(folder: Path) -> None:
    few = "data: expected at least a batch of"
    for name in ("nano-dct", "nano/1-coder"):
        refused(run("train", name, "--data", "photos", "--output", "out"), few)
    names = "nor the name of a configuration (nano/1-coder, nano/2-filter, nano/3-length, nano/generator, nano-dct)"
    refused(run("train", "nano/1", "--output", "out"), f"{names}; did you mean 'nano/1-coder'?")
    far = run("train", "nonsense", "--output", "out")
    refused(far, names)
    assert "did you mean" not in text(far)


def test_starting_imports_nothing_heavy() -> None:
    heavy = "matplotlib skimage torch._dynamo torch.distributed.checkpoint alit.training alit.evaluation alit.demo"
    code = f"""
import sys
from typer.testing import CliRunner
from alit.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print([x for x in {heavy.split()} if x in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reconstruct(folder: Path) -> None:
    done = run("reconstruct", "photos", "photos/a.png", "-o", "deep/out", "--tokens", 6)
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir("deep/out")) == ["a.png", "b.png", "c.png"]  # a.png was given twice
    m = model()
    images = [fitting.load(f"photos/{name}.png", (16, 24), 4, "whole").image for name in "abc"]
    decoded = m.decode(m.encode(images, FixedLength(6)))
    for name, original, pixels in zip("abc", images, decoded, strict=True):
        with Image.open(f"deep/out/{name}.png") as image:
            assert image.tobytes() == to_image(pixels).tobytes()
        rounded = (pixels.clamp(0, 1) * 255).round() / 255
        error = float((rounded - original).abs().mean())
        row = next(line for line in done.output.splitlines() if line.startswith(f"{name}.png"))
        assert re.search(rf" 6 +30 +{error:.3f} \(", row), row


def test_reconstruct_beside_and_equal_names(folder: Path) -> None:
    os.mkdir("more")
    Image.open("photos/a.png").save("more/a.bmp")
    done = run("reconstruct", "photos/a.png", "more", "-o", "out", "--beside", "--max-l1", 0.5)
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir("out")) == ["a-2.png", "a.png"]
    sheet = Image.open("out/a.png")
    assert sheet.size == (3 * 24, 16)
    original = load("photos/a.png", (16, 24))
    assert sheet.crop((0, 0, 24, 16)).tobytes() == to_image(original).tobytes()


@pytest.mark.parametrize("command", ["encode photos -o x.alit", "reconstruct photos -o out"])
def test_the_others_are_done_all_the_same(folder: Path, command: str) -> None:
    os.mkdir("photos/folder.png")
    Path("photos/bb.png").write_bytes(Path("cut.png").read_bytes())
    done = run(*command.split(), "notes.txt", "--tokens", 3)
    refused(done, "notes.txt: not a readable image (cannot identify")
    assert "bb.png: not a readable image (" in text(done) and "folder.png" not in done.output
    if "encode" in command:
        assert "3 images, 9 tokens" in text(done)
    else:
        assert sorted(os.listdir("out")) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reconstruct notes.txt -o out", "notes.txt: not a readable image (cannot identify"),
        ("reconstruct cut.png -o out", "cut.png: not a readable image (image file is truncated"),
        ("encode photos -o photos", "photos: expected a file or nothing there, found a folder"),
        ("encode photos/a.png -o photos/a.png", "photos/a.png is one of the images; choose"),
        ("encode photos -o x.alit --device meta", "got 'meta' (it computes nothing)"),
        ("compact weights/nano.safetensors weights/nano.safetensors", "is the source; choose"),
        ("convert whole.png whole.png", "target: whole.png is the source; choose another file"),
        ("convert whole.png x.safetensors", "whole.png: expected a zip file, as torch.save writes"),
        ("train whole.png --output out", "whole.png: not a configuration in YAML, nor any text"),
        ("train --data photos --output out --image-size 0", "image_size: expected"),
        ("reconstruct photos -o notes.txt", "error: notes.txt: file exists"),
        ("reconstruct photos -o notes.txt/out", "error: notes.txt/out: not a directory"),
        ("demo -o notes.txt", "expected one of square images, got 24x16"),
        ("reconstruct photos -o photos", "a.png is one of the photographs; choose another folder"),
        ("reconstruct photos --tokens 3 --max-l1 1", "--code-error or --tokens, got several"),
        ("reconstruct photos --model nanno", "weights (nano); did you mean 'nano'?"),
        ("decode x.alit -o out --model notes.txt", "notes.txt: not a safetensors file"),
        (
            "reconstruct photos --device cuda:99",
            "device: expected auto, cpu or cuda:N that is there",
        ),
        ("demo --device gpu", "got 'gpu'"),
        ("demo --train --device gpu", "got 'gpu'"),
        ("demo --train --model photos/a.png", "--model: expected none with --train"),
        ("decode x.alit -o out --device gpu", "got 'gpu'"),
        ("encode nowhere -o x.alit", "nowhere: no such file or folder"),
        ("encode empty -o x.alit", "no image found"),
        ("encode notes.txt -o x.alit", "notes.txt: not a readable"),
        ("encode photos -o no/x.alit", "no: no such folder"),
        ("encode photos -o x.alit --fit hole", "fit: expected one of whole, crop, pad, got 'hole'"),
        ("reconstruct photos -o out --fit box", "fit: expected one of whole, crop, pad, got 'box'"),
        ("encode photos -o x.alit --tokens 13", "tokens: expected 1 to 12, got 13"),
        ("decode whole.png -o out", "whole.png: not an .alit file, as alit encode writes them"),
        ("decode missing.alit -o out", "error: missing.alit: no such file or directory"),
        ("decode good.alit -o out --model other.safetensors", "written by another model"),
        ("info whole.png", "whole.png: not an .alit file"),
        ("info cut.alit", "cut.alit: truncated or damaged"),
        ("encode photos -o photo.png", "photo.png: expected a name that ends in .alit"),
        ("compact nothing small.safetensors", "no such file"),
        ("train --set steps", "expected name=value"),
        ("evaluate no-such --data photos", "no such file"),
        ("evaluate nano --data no", "not a folder"),
        ("train --data photos", "output: expected a folder"),
        ("train --output x --set stepps=1", "did you mean"),
        ("train --output x --set model=3", "options by name"),
        ("demo --train -o x --image-size 100", "image_size: expected"),
    ],
)
def test_errors_have_no_traceback(folder: Path, arguments: str, message: str) -> None:
    refused(run(*arguments.split()), message)
    assert not Path("x.alit").exists() and sorted(os.listdir("photos")) == [
        "a.png",
        "b.png",
        "c.png",
    ]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_unwritable_folder(folder: Path) -> None:
    (folder / "empty").chmod(0o500)
    done = run("reconstruct", "photos", "-o", "empty")
    assert done.exit_code == 1 and "empty/a.png: permission denied" in done.output


@pytest.mark.parametrize("package", ["matplotlib", "skimage"])
@pytest.mark.parametrize("options", [(), ("--train",)])
def test_missing_library_is_named(
    package: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(image_size=(16, 16)).save_pretrained(tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "out"
    weights = () if options else ("--model", tmp_path / "m.safetensors")
    done = run("demo", "-o", output, "--seconds", 1, *weights, *options)
    name = {"skimage": "scikit-image"}.get(package, package)
    refused(done, f"error: this needs {name}: pip install 'alit[demo]'")
    assert not output.exists()


def test_full_memory_is_an_error_and_a_bug_is_not_hidden() -> None:
    with pytest.raises(typer.Exit), errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    for error in (RuntimeError("a bug"), BrokenPipeError()):  # the latter is for typer
        with pytest.raises(type(error)), errors():
            raise error


@pytest.mark.parametrize("error", (RuntimeError, IndexError, struct.error, OSError))
def test_whatever_a_decoder_raises(
    error: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any error of a decoder is an OSError: Pillow's AVIF decoder raises others on damaged files."""

    def broken(*_: object) -> None:
        raise error("Failed to decode image")

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(OSError, match="Failed to decode image"):
        load_square("whole.png", 16)


def test_rounding_and_atomic_images(tmp_path: Path) -> None:
    image = to_image(torch.tensor([-1.0, 0.4999, 2.0])[:, None, None].expand(3, 2, 2))
    assert image.getpixel((0, 0)) == (0, 127, 255)
    save_image(image, tmp_path / "x.png")
    assert os.listdir(tmp_path) == ["x.png"]


def test_dct_reconstructs() -> None:
    """All coefficients restore the image, few its low frequencies; the scale suits photographs."""
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


def test_compact_halves_a_model(tmp_path: Path) -> None:
    """``compact`` halves a model's file; only values beyond the range of 16 bits stay as they are."""
    source, target = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    m = model(ema_decay=0.9)
    m.quantize.cluster_size[0] = 1e5
    m.save_pretrained(source)
    assert run("compact", source, target).exit_code == 0
    assert target.stat().st_size < 0.6 * source.stat().st_size
    loaded = AdaptiveTokenizer.from_pretrained(target).state_dict()
    assert loaded["quantize.cluster_size"][0] == 1e5
    for name, tensor in m.state_dict().items():
        if name != "quantize.cluster_size":
            assert torch.equal(loaded[name], tensor.half().float()), name
