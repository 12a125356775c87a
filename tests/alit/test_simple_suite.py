"""The suite of drawn images, and the command on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alit import FixedLength
from alit.evaluation import Drawing, drawings, evaluate, metrics, simple, thumbnail
from alit.evaluation.evaluate import kinds_of
from alit.evaluation.length import Rows
from tests.helpers.commands import refused, run, text
from tests.helpers.models import model

KINDS = ["flat", "gradient", "line drawing", "text", "icon", "chart", "screenshot", "logo"]


def test_drawings() -> None:
    """Drawings are several different ones of each kind, the same in every call and at every size."""
    drawn, again, smaller = drawings(256), drawings(64), drawings(64)
    assert Counter(x.kind for x in drawn) == dict.fromkeys(KINDS, 4)
    assert list(dict.fromkeys(x.kind for x in drawn)) == KINDS
    for x, y, z in zip(drawn, again, smaller, strict=True):
        assert x.pixels.shape == (3, 256, 256) and x.pixels.dtype == torch.float32
        assert x.pixels.min() >= 0 and x.pixels.max() <= 1
        assert torch.equal(y.pixels, z.pixels)
        means = torch.nn.functional.avg_pool2d(x.pixels, 4)
        torch.testing.assert_close(means, z.pixels, atol=1.5 / 255, rtol=0)
    assert len({x.pixels.numpy().tobytes() for x in drawn}) == len(drawn)
    for kind, most in (("flat", 0), ("gradient", 0.02)):
        steps = [x.pixels.diff(dim=2).abs().max() for x in drawn if x.kind == kind]
        assert max(steps) <= most, kind
    # Edges do not lie on a grid of blocks, which would favor block coders.
    steps = metrics.border_steps(torch.stack([x.pixels for x in drawn])).mean(0)
    assert steps[0] < 1.3 * steps[2] and steps[1] < 1.3 * steps[2]


def test_kinds_are_measured_apart() -> None:
    m, drawn = model(image_size=(16, 16)), drawings(16)
    result = evaluate(m, drawn, batch_size=5)
    assert result.images == 32 and [x.kind for x in result.kinds] == KINDS
    for kind in result.kinds:
        x = torch.stack([drawing.pixels for drawing in drawn if drawing.kind == kind.kind])
        assert kind.images == len(x) == 4
        for row in kind.lengths:
            y = (m.decode(m.encode(x, FixedLength(row.tokens))).clamp(0, 1) * 255).round() / 255
            assert row.model == pytest.approx(float(metrics.l1(x, y).mean()), abs=1e-4)
            beside = metrics.l1(x, thumbnail(x, row.tokens * 5))
            assert row.thumbnail == pytest.approx(float(beside.mean()), abs=1e-6)
        won = all(row.model < row.thumbnail for row in kind.lengths)
        assert kind.beats_thumbnail == won
    mean = sum(x.lengths[0].model for x in result.kinds) / 8
    assert result.lengths[0].model.l1 == pytest.approx(mean)
    with pytest.raises(ValueError, match=r"images: expected shape \(3, 16, 16\), got \(3, 24"):
        evaluate(m, drawings(24))


@pytest.mark.parametrize("second", [0.1, 0.3])
def test_a_kind_beats_the_thumbnail_at_every_length(second: float) -> None:
    """A kind beats the thumbnail if the mean over its images does at every length, whatever the other kinds do."""
    drawn = [Drawing(kind, torch.zeros(3, 8, 8)) for kind in ("text", "icon", "text")]
    lengths: list[Any] = []
    for tokens, ours in ((3, 0.1), (6, second)):
        found = SimpleNamespace(tokens=tokens, ours=Rows(), theirs=Rows())
        found.ours.add({"l1": torch.tensor([ours - 0.05, 0.9, ours + 0.05], dtype=torch.float64)})
        found.theirs.add({"l1": torch.tensor([0.2, 0.1, 0.2], dtype=torch.float64)})
        lengths.append(found)
    text_kind, icon = kinds_of(drawn, lengths)
    assert (text_kind.kind, text_kind.images) == ("text", 2)
    assert [x.model for x in text_kind.lengths] == pytest.approx([0.1, second])
    assert text_kind.beats_thumbnail == (second == 0.1)
    assert (icon.kind, icon.beats_thumbnail, icon.lengths[0].thumbnail) == ("icon", False, 0.1)


def test_without_freetype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simple.features, "check", lambda name: name != "freetype2")
    with pytest.raises(ValueError, match="suite: expected a Pillow with FreeType"):
        drawings(16)


def test_command(folder: Path, tmp_path: Path) -> None:
    path, report = tmp_path / "model.safetensors", tmp_path / "report"
    model(image_size=(32, 32), latents_per_iteration=40).save_pretrained(path)
    options = ("--suite", "simple", "--limit", 6, "--calibration", "--output", report)
    done = run("evaluate", path, *options)
    assert done.exit_code == 0 and "6 images" in text(done), done.output
    assert all(x in done.output for x in ("loses", "perplexity", "CodeError", "gradient", "webp"))
    stored = json.loads((report / "evaluation.json").read_text())
    kinds = {x["kind"]: x["images"] for x in stored["kinds"]}
    assert kinds == {"flat": 4, "gradient": 2}
    assert {"tokens", "bits", "model", "thumbnail", "codes_used", "perplexity"} <= set(
        stored["lengths"][0]
    )
    assert len(stored["iterations"]) == 4 and stored["calibration"][0]["criterion"] == "MaxL1"
    assert (report / "evaluation.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (("--suite", "simple", "--data", "."), "either --data FOLDER or --suite NAME, got both"),
        ((), "data: expected either --data FOLDER or --suite NAME, got neither"),
        (("--suite", "hard"), "suite: expected one of simple, got 'hard'"),
    ],
)
def test_what_to_evaluate(options: tuple[str, ...], message: str, here: Path) -> None:
    refused(run("evaluate", "nano", *options), message)
