"""Weights that come with the package, and files of 16-bit weights."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import safetensors
import torch
from PIL import Image

from alit import AdaptiveTokenizer, FixedLength, MaxL1, TokenSequence
from alit.demo import photographs
from alit.demo.measure import measure
from alit.model_file import SHIPPED
from tests.helpers.commands import run
from tests.helpers.models import images, model

WEIGHTS = sorted(SHIPPED.glob("*.safetensors"))


def test_16_bit_files_give_float32_models(tmp_path: Path) -> None:
    """A model has the same fingerprint stored in 16 or 32 bits, and is loaded as float32."""
    half, single = tmp_path / "half.safetensors", tmp_path / "single.safetensors"
    model().half().save_pretrained(half)
    loaded = AdaptiveTokenizer.from_pretrained(half)
    assert {x.dtype for x in loaded.state_dict().values() if x.is_floating_point()} == {
        torch.float32
    }
    assert loaded.identity() == AdaptiveTokenizer.from_pretrained(half).identity()
    loaded.save_pretrained(single)
    assert loaded.identity() == AdaptiveTokenizer.from_pretrained(single).identity()
    tokens = loaded.encode(images(), FixedLength(6))
    data = tokens.to_bytes(loaded.identity())
    again = AdaptiveTokenizer.from_pretrained(half)
    assert torch.equal(TokenSequence.from_bytes(data, again.identity()).rows, tokens.rows)


def test_they_are_small_and_16_bit() -> None:
    assert [file.stem for file in WEIGHTS] == ["nano"]
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 16e6
    for file in WEIGHTS:
        with safetensors.safe_open(str(file), framework="pt") as content:
            kinds = {content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
        assert not kinds & {"F32", "F64"} and "F16" in kinds, file


@pytest.mark.parametrize("name", [file.stem for file in WEIGHTS])
def test_the_card_says_what_was_measured(name: str) -> None:
    """The card's table has a row for every length of the evaluation, with the same figures."""
    card = (SHIPPED / "README.md").read_text()
    results = Path(__file__).parents[2] / "benchmarks" / "results" / name / "evaluation.json"
    lengths = json.loads(results.read_text())["lengths"]
    assert len(lengths) == card.count("\n| ") - 1, "a row each, and the head"
    for each in lengths:
        own, thumbnail, webp = each["model"], each["thumbnail"], each["webp"]
        cells = [str(each["tokens"]), f"{each['bits']:.0f}"]
        for figure, digits in (("l1", 4), ("psnr", 2), ("ssim", 3)):
            cells += [f"{x[figure]:.{digits}f}" for x in (own, thumbnail)]
        cells += [str(each["loses"]), "none so small" if webp is None else str(webp["wins"])]
        assert f"\n| {' | '.join(cells)} |\n" in card


@pytest.mark.parametrize("name", [file.stem for file in WEIGHTS])
def test_they_beat_a_thumbnail_and_more_tokens_do_not_hurt(name: str) -> None:
    """On photographs outside the training data, every length beats a thumbnail, and more tokens do not hurt."""
    m = AdaptiveTokenizer.from_pretrained(name)
    measured = measure(m, photographs(m.config.image_size[0]), max_l1=0.08)
    ours, theirs = measured.l1.mean(1), measured.thumbnail_l1.mean(1)
    assert (ours < theirs).all(), (ours, theirs)
    assert (ours[1:] < 1.01 * ours[:-1]).all(), ours


@torch.no_grad()
def test_one_color_takes_few_tokens() -> None:
    m = AdaptiveTokenizer.from_pretrained("nano")
    colors = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    images = colors.expand(-1, -1, *m.config.image_size)
    tokens = m.encode(images, MaxL1(0.02))
    shown = m.decode(tokens)
    assert isinstance(shown, torch.Tensor)
    assert tokens.lengths.max() <= 8 and (shown - images).abs().mean() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 288), (320, 192)])
def test_other_shapes_are_described_as_well(size: tuple[int, int]) -> None:
    """Other shapes of as many pixels, the same photographs squeezed, have about the same error."""
    m = AdaptiveTokenizer.from_pretrained("nano")
    square = torch.stack(list(photographs(m.config.image_size[0]).values())[:8])
    other = torch.nn.functional.interpolate(square, size, mode="bicubic", antialias=True).clamp(
        0, 1
    )
    errors = []
    for whole in (square, other):
        shown = m.decode(m.encode(list(whole), FixedLength(256)))
        assert isinstance(shown, torch.Tensor)
        errors.append((shown.clamp(0, 1) - whole).abs().mean())
    assert errors[1] < 1.05 * errors[0], errors


def test_reconstruct_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    for owner, name in (
        *((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")),
    ):
        monkeypatch.setattr(owner, name, refuse)
    photo = tmp_path / "photo.jpg"
    Image.effect_mandelbrot((320, 200), (-2, -1.5, 1, 1.5), 100).save(photo)
    done = run("reconstruct", photo, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "out" / "photo.png").size == (320, 192)
