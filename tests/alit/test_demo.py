"""alit demo: the page, its images and its numbers; training live."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from alit import FixedLength, MaxL1
from alit.demo import FEATURED, PHOTOGRAPHS, photographs
from alit.demo.figures import spread
from alit.demo.measure import Measured, measure
from alit.demo.page import UNKNOWN, page
from alit.demo.sheet import TILE
from tests.helpers.commands import run, text
from tests.helpers.models import model

IMAGES = ["attention.png", "error.png", "reconstructions.png", "tokens.png"]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Measurements of photographs with a limit that some meet early, some late, some never."""
    m, photos = model(image_size=(16, 16)), photographs(16)
    errors = measure(m, photos, max_l1=0.1).l1
    return measure(m, photos, max_l1=float(errors.amin(0).median()) + 1e-3)


def test_what_is_measured(measured: Measured) -> None:
    m = model(image_size=(16, 16))
    assert measured.lengths == [3, 6, 9, 12] and measured.bits == [15, 30, 45, 60]
    assert sorted(measured.names) == sorted(PHOTOGRAPHS)
    photos = photographs(16)
    for name, image in zip(measured.names, measured.images, strict=True):
        assert torch.equal(image, photos[name])
    lengths = m.encode(measured.images, MaxL1(measured.max_l1)).lengths
    assert torch.equal(measured.tokens[measured.reached], lengths[measured.reached])
    assert 0 < measured.reached.sum() < len(photos)
    assert (measured.tokens[~measured.reached] == 12).all()
    assert measured.tokens.tolist() == sorted(measured.tokens.tolist())  # from plain to busy
    for k, length in enumerate(measured.lengths):
        decoded = m.decode(m.encode(measured.images, FixedLength(length))).clamp(0, 1)
        torch.testing.assert_close(measured.pixels[k], decoded, atol=0.5 / 255 + 1e-4, rtol=0)
    assert measured.attention.shape == (len(photos), 12, 4, 4)


def test_final_tokens_have_attention_too() -> None:
    """Attention of final tokens is there too if the recurrence drops them from the encoder."""
    m = model(image_size=(16, 16), recurrence="residual", codebooks="each")
    photos = dict(list(photographs(16).items())[:2])
    assert measure(m, photos).attention.shape == (2, 12, 4, 4)


def test_page_tells_what_was_measured(measured: Measured) -> None:
    text = page(model(image_size=(16, 16)), "some <model>", measured)
    assert "some &lt;model&gt;" in text and "$" not in text
    cells = re.findall(r"<tr><td>(\d+)<td>(\d+)<td[^>]*>([\d.]+)<td[^>]*>([\d.]+)</tr>", text)
    ours, theirs = measured.l1.mean(1).tolist(), measured.thumbnail_l1.mean(1).tolist()
    expected = zip(measured.lengths, measured.bits, ours, theirs, strict=True)
    assert cells == [(f"{n}", f"{b:.0f}", f"{x:.3f}", f"{y:.3f}") for n, b, x, y in expected]
    wins = sum(x < y for x, y in zip(ours, theirs, strict=True))
    assert {0: "at none of the lengths", 4: "at all 4"}.get(wins, f"at {wins} of 4") in text
    assert f"{int((~measured.reached).sum())} of {len(PHOTOGRAPHS)} do not get there" in text
    assert sorted(re.findall(r'src="(.*?)"', text)) == IMAGES
    links = [link for link in re.findall(r'href="(.*?)"', text) if link not in IMAGES]
    assert links == ["https://arxiv.org/abs/2411.02393"]  # nothing is loaded from elsewhere
    assert UNKNOWN in text


def test_demo_writes_page_and_images(tmp_path: Path) -> None:
    weights, output = tmp_path / "m.safetensors", tmp_path / "page"
    model(image_size=(16, 16)).save_pretrained(weights)
    done = run("demo", "-o", output, "--model", weights, "--max-l1", 0.3)
    assert done.exit_code == 0, done.output
    assert "page/index.html" in text(done)
    assert sorted(os.listdir(output)) == [*IMAGES[:2], "index.html", *IMAGES[2:]]
    assert "an error of 0.3" in (output / "index.html").read_text(encoding="utf-8")
    for name in IMAGES:
        assert len(set(Image.open(output / name).convert("L").tobytes())) > 50, name
    with Image.open(output / "reconstructions.png") as sheet:
        assert sheet.width > 5 * TILE and sheet.height > 2 * len(FEATURED) * TILE


def test_labels_move_apart() -> None:
    assert spread([0.3, 0.1], gap=0.1) == pytest.approx([0.3, 0.1])
    placed = spread([0.2, 0.2, 0.21, 0.9, 0.0], gap=0.1)
    assert all(b - a > 0.1 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert placed[3] == pytest.approx(0.9) and placed[4] == pytest.approx(0.0)
    assert sum(placed) == pytest.approx(0.2 + 0.2 + 0.21 + 0.9)


def test_training_live(tmp_path: Path) -> None:
    """Two seconds of training write all images; good ones would take minutes."""
    output = tmp_path / "images"
    done = run("demo", "--train", "--output", output, "--seconds", 2, "--image-size", 32)
    assert done.exit_code == 0, done.output
    assert sorted(os.listdir(output)) == ["error.png", "loss.png", "reconstructions.png"]
    assert str(output) in text(done)
    sheet = Image.open(output / "reconstructions.png")
    assert sheet.width > 9 * 32 and sheet.height > 12 * 32
