"""Numbers of tokens that the command line gives images: its options, budgets of folders, predicted lengths."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alit import (
    AdaptiveTokenizer,
    Budget,
    CodeError,
    Criterion,
    FixedLength,
    MaxL1,
    MinSSIM,
    Predicted,
    RelativeL1,
    TokenSequence,
    fitting,
)
from alit.commands.options import RELATIVE_L1
from alit.curves import l1_curves
from alit.images import to_image
from tests.helpers.commands import refused, run
from tests.helpers.models import images, model


@pytest.fixture
def folder(here: Path) -> Path:
    """Working folder: photos with three images, and notes.txt."""
    (here / "photos").mkdir()
    for name, size, image in zip("abc", ((24, 16), (60, 40), (40, 60)), images(), strict=True):
        to_image(image).resize(size).save(f"photos/{name}.png")
    Path("notes.txt").write_text("no image")
    return here


def whole() -> list[torch.Tensor]:
    """The photos as tensors, fitted as by the command line."""
    return [fitting.load(f"photos/{name}.png", (16, 24), 4, "whole").image for name in "abc"]


@pytest.mark.parametrize(
    ("given", "criterion"),
    [
        ((), RelativeL1(RELATIVE_L1)),
        (("--relative-l1", 1.2), RelativeL1(1.2)),
        (("--max-l1", 0.3), MaxL1(0.3)),
        (("--min-ssim", 0.02), MinSSIM(0.02)),
        (("--code-error", 0.6), CodeError(0.6)),
        (("--tokens", 5), FixedLength(5)),
    ],
    ids=range(6),
)
def test_how_many_tokens(folder: Path, given: tuple[object, ...], criterion: Criterion) -> None:
    done = run("reconstruct", "photos", "-o", "out", *given)
    assert done.exit_code == 0, done.output
    images = whole()
    for name, length in zip("abc", model().encode(images, criterion).lengths, strict=True):
        row = next(line for line in done.output.splitlines() if line.startswith(f"{name}.png"))
        assert row.split()[1] == str(int(length))


@pytest.mark.parametrize(("limit", "count"), [(1e-6, 3), (1.0, 0)])
def test_missed_limits_are_counted(folder: Path, limit: float, count: int) -> None:
    """``encode`` says how many images no number of tokens brings within the limit."""
    encode = ("encode", "photos", "-o", "x.alit", "--max-l1", limit)
    said = f"{count} of them miss the limit with any number of tokens"
    assert (said in run(*encode).output) == bool(count)
    assert json.loads(run(*encode, "--json").output)["unmet"] == count


def test_budget_of_a_folder(folder: Path) -> None:
    """A budget is shared by the images of a folder that can be read; other files are named."""
    done = run("encode", "photos", "notes.txt", "-o", "x.alit", "--budget", 7, "--in-flight", 2)
    refused(done, "1 of 4 files skipped")
    m = model()
    images = whole()
    expected = m.encode(images, Budget(7))
    tokens = TokenSequence.from_bytes(Path("x.alit").read_bytes(), m.identity())
    assert tokens.lengths.tolist() == expected.lengths.tolist() and int(tokens.lengths.sum()) <= 21
    assert torch.equal(tokens.rows, expected.rows)


def test_an_image_that_changes_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an image changes after lengths were searched, the command fails and writes nothing."""
    command = importlib.import_module("alit.commands.encode")

    def curves(*arguments: Any) -> torch.Tensor:
        Path("photos/b.png").write_text("no image")
        return l1_curves(*arguments)

    monkeypatch.setattr(command, "l1_curves", curves)
    done = run("encode", "photos", "-o", "x.alit", "--budget", 7)
    refused(done, "b.png: not a readable image")
    assert not Path("x.alit").exists()


def test_lengths_that_a_trained_head_predicts(folder: Path) -> None:
    options = ("--steps", 5, "--batch-size", 2, "--set", "tensorboard=false", "--set", "workers=0")
    weights = "weights/nano.safetensors"
    train = ("train", "--stage", "length", "--start-from", weights, "--data", "photos")
    done = run(*train, "--output", "run", *options)
    assert done.exit_code == 0, done.output
    trained = ("--model", "run/model.safetensors")
    done = run("reconstruct", "photos", "-o", "out", "--predict", "--max-l1", 0.3, *trained)
    assert done.exit_code == 0, done.output
    m = AdaptiveTokenizer.from_pretrained("run/model.safetensors")
    images = whole()
    for name, length in zip("abc", m.encode(images, Predicted(max_l1=0.3)).lengths, strict=True):
        row = next(line for line in done.output.splitlines() if line.startswith(f"{name}.png"))
        assert row.split()[1] == str(int(length))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "encode photos -o x.alit --tokens 3 --min-ssim 1",
            "expected --relative-l1 or --max-l1 or",
        ),
        ("encode photos -o x.alit --budget 2", "mean_tokens: expected 3 to 12, shortest"),
        ("encode notes.txt -o x.alit --budget 6", "notes.txt: not a readable image"),
        ("encode photos -o x.alit --predict", "train one: alit train --stage length --start-from"),
        (
            "encode photos -o x.alit --predict --tokens 3",
            "--predict: expected one of --relative-l1",
        ),
        ("reconstruct photos --predict --min-ssim 0.5", "with it, got --min-ssim"),
        ("train --stage length --data photos --output out", "start_from: stage length expects"),
        ("encode photos -o x.alit --min-ssim 2", "threshold: expected at most 1, got 2"),
    ],
)
def test_errors_have_no_traceback(folder: Path, arguments: str, message: str) -> None:
    refused(run(*arguments.split()), message)
    assert not Path("x.alit").exists()
