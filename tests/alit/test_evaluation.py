"""Evaluation against metrics computed here, the thumbnail baseline, and the two commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from alit import AdaptiveTokenizer, FixedLength
from alit.evaluation import Networks, evaluate, metrics, networks, thumbnail, thumbnail_side
from alit.evaluation.learned import INCEPTION
from alit.images import load_square
from alit.losses.perceptual import VGG16
from tests.helpers.commands import refused, run
from tests.helpers.models import model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        coarse = random.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(
            path / f"{index}.png"
        )
    (path / "3.png").write_bytes(b"no image")
    return path


def small(**options: object) -> AdaptiveTokenizer:
    return model(image_size=(16, 16), **options)


def test_numbers_are_those_of_single_images(folder: Path) -> None:
    m, files = small(), sorted(folder.iterdir())
    result = evaluate(m, files, batch_size=2)
    assert result.images == 3 and [Path(x.split(":")[0]).name for x in result.unreadable] == [
        "3.png"
    ]
    assert [row.tokens for row in result.lengths] == [3, 6, 9, 12]
    images = torch.stack([load_square(file, 16) for file in files[:3]])
    for row in result.lengths:
        tokens = m.encode(images, FixedLength(row.tokens))
        y = (m.decode(tokens).clamp(0, 1) * 255).round() / 255
        for quality, shown in ((row.model, y), (row.thumbnail, thumbnail(images, row.bits))):
            values = []
            for pair in zip(images, shown, strict=True):
                a, b = (x.permute(1, 2, 0).double().numpy() for x in pair)
                ssim = structural_similarity(a, b, channel_axis=2, data_range=1)
                psnr = peak_signal_noise_ratio(a, b, data_range=1)
                values.append((np.abs(a - b).mean(), psnr, ssim))
            l1, psnr, ssim = np.mean(values, axis=0)
            assert quality.l1 == pytest.approx(l1, abs=1e-4)
            assert quality.psnr == pytest.approx(psnr, abs=0.02)
            assert quality.ssim == pytest.approx(ssim, abs=1e-3)
        assert row.bits == row.tokens * 5
        assert row.codes_used == len(tokens.rows.unique()) / 32
        share = np.bincount(tokens.rows) / len(tokens.rows)
        entropy = -sum(p * math.log(p) for p in share if p > 0)
        assert row.perplexity == pytest.approx(math.exp(entropy))


def test_metrics() -> None:
    """PSNR, SSIM and L1 of equal images, and against values computed in float64."""
    a, b = torch.rand(2, 2, 3, 16, 24).unbind()
    assert metrics.psnr(a, a).tolist() == [100, 100] and metrics.ssim(a, a).tolist() == [1, 1]
    assert metrics.l1(a, b).shape == (2,) and metrics.l1(a[0], b[0]).shape == ()
    planes = [x[0].permute(1, 2, 0).double().numpy() for x in (a, b)]
    expected = structural_similarity(*planes, channel_axis=2, data_range=1)
    assert float(metrics.ssim(a, b)[0]) == pytest.approx(expected, abs=1e-9)


def test_thumbnail() -> None:
    assert [thumbnail_side(12 * n) for n in (32, 64, 128, 256)] == [5, 8, 11, 16]
    assert thumbnail_side(1) == 1
    flat = torch.full((1, 3, 32, 32), 7 / 15)
    torch.testing.assert_close(thumbnail(flat, 12 * 16), flat)
    halves = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], dim=3)
    row = thumbnail(halves, 12 * 4)[0, 0, 0]
    assert row[0] == 0 and row[-1] == 1 and bool((row.diff() >= 0).all())
    levels = thumbnail(torch.rand(1, 3, 64, 64), 12 * 64 * 64).unique()
    assert len(levels) == 16  # a side of 64: no interpolation, 4 bits
    image = torch.rand(1, 3, 16, 24)
    most = thumbnail(image, 12 * 24 * 24)
    assert (most - image).abs().max() <= 0.5 / 15 + 1e-6
    assert torch.equal(thumbnail(image, 1e9), most), "never larger than the image"


def test_protocols(tmp_path: Path) -> None:
    pixels = torch.tensor([-1.0, 0.4999, 2.0])
    assert (metrics.eight_bits(pixels) * 255).round().tolist() == [0, 127, 255]
    assert (metrics.eight_bits(torch.tensor([0.9999]), truncated=True) * 255).round().tolist() == [
        254
    ]
    random = np.random.default_rng(0)
    for index, size in enumerate(((24, 16), (10, 40))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{index}.png"
        )
    files = sorted(tmp_path.glob("*.png"))
    official = evaluate(small(), files, protocol="official")
    assert official.images == 1 and "at least 16 x 16 pixels, got 40 x 10" in official.unreadable[0]
    assert evaluate(small(), files).images == 2
    with pytest.raises(ValueError, match="protocol: expected one of pinned, official, got 'paper'"):
        evaluate(small(), files, protocol="paper")
    with pytest.raises(ValueError, match="square"):
        evaluate(model(), files)
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        evaluate(small(), files[:1])


class Distance(nn.Module):
    """Substitute for LPIPS: a weighted mean squared difference, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])[:, None, None])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.weight * (x - y).square()).mean((1, 2, 3))


class Features(nn.Module):
    """Substitute for Inception: random projection of four block means to four features."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 4, generator=generator))

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        assert levels.dtype == torch.uint8
        means = torch.nn.functional.adaptive_avg_pool2d(levels.float() / 255, 2)
        return means.flatten(1) @ self.weight


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    difference = a.mean(0) - b.mean(0)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root))


def torchmetrics_fails() -> bool:
    """True if importing torchmetrics fails, as with a torchvision that does not fit torch."""
    try:
        import torchmetrics.image  # noqa: F401
    except ModuleNotFoundError:
        return False
    except Exception:
        return True
    return False


@pytest.mark.skipif(torchmetrics_fails(), reason="a torchvision that does not fit torch")
def test_metrics_of_other_networks(folder: Path) -> None:
    """LPIPS and rFID of every length against their definitions, with small substitute networks."""
    random = np.random.default_rng(1)
    for index in range(4, 9):
        pixels = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(folder / f"{index}.png")
    m, files = small(), sorted(folder.iterdir())
    distance, features = Distance(), Features()
    result = evaluate(m, files, batch_size=3, networks=Networks(distance, features))
    plain = evaluate(m, files, batch_size=3)
    x = torch.stack([load_square(file, 16) for file in files if file.name != "3.png"])
    with torch.no_grad():
        real = features((x * 255).round().byte()).double().numpy()
        for row, without in zip(result.lengths, plain.lengths, strict=True):
            assert (without.model.lpips, without.model.rfid) == (None, None)
            assert without.model.l1 == row.model.l1
            y = (m.decode(m.encode(x, FixedLength(row.tokens))).clamp(0, 1) * 255).round() / 255
            z = (thumbnail(x, row.bits).clamp(0, 1) * 255).round() / 255
            for quality, shown in ((row.model, y), (row.thumbnail, z)):
                assert quality.lpips == pytest.approx(float(distance(x, shown).mean()), abs=1e-4)
                expected = frechet(real, features((shown * 255).round().byte()).double().numpy())
                assert quality.rfid == pytest.approx(expected, rel=2e-2, abs=1e-3)
    alone = evaluate(m, files[:1], networks=Networks(distance, features)).lengths[0].model
    assert alone.rfid is None and alone.lpips is not None, "one image has no distribution"


@pytest.mark.usefixtures("offline")
def test_networks_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    found = networks()
    assert (found.perceptual, found.inception) == (None, None)
    assert [x.split(":")[0] for x in found.left_out[:2]] == ["LPIPS", "rFID"]
    assert all("--fetch gets them" in x for x in found.left_out[:2])
    with pytest.raises(ValueError, match=r"weights of VGG16 cannot be had .*no network"):
        networks(fetch=True)
    # Files of weights that cannot be used leave a reason instead of a column.
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    for url in (VGG16, INCEPTION):
        (tmp_path / "hub/checkpoints" / Path(url).name).write_bytes(b"")
    found = networks()
    assert (found.perceptual, found.inception) == (None, None)
    assert "VGG16 cannot be had" in found.left_out[0] and "torch-fidelity" in found.left_out[1]
    path = tmp_path / "model.safetensors"
    small().save_pretrained(path)
    (folder / "3.png").unlink()
    shown = run("evaluate", path, "--data", folder)
    assert shown.exit_code == 0 and "left out LPIPS" in shown.output, shown.output
    refused(run("evaluate", path, "--data", folder, "--fetch"), "error: perceptual: the weights of")
    monkeypatch.setattr(
        "alit.commands.evaluate.networks", lambda *a, **k: Networks(Distance(), Features())
    )
    shown = run("evaluate", path, "--data", folder)
    assert shown.exit_code == 0 and "LPIPS" in shown.output and "rFID" in shown.output


def test_commands_train_then_evaluate(folder: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "run", tmp_path / "report"
    options = (
        "--image-size 32 --steps 2 --batch-size 2 --device cpu --set workers=0 --set log_every=1"
    )
    options += " --size nano --set image_every=2 --set model.code_dim=6"
    arguments = ("train", "--data", folder, "--output", output, *options.split())
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "after 2 steps" in done.output and "without an image: 1\n" in done.output
    assert any((output / "tensorboard").iterdir())
    described = json.loads((output / "config.json").read_text())["model"]
    assert described == {"size": "nano", "base": "dct", "image_size": 32, "code_dim": 6}
    refused(run(*arguments), "resume it")
    resumed = run("train", output / "config.json", "--resume")
    assert resumed.exit_code == 0, resumed.output
    done = run("evaluate", output / "model.safetensors", "--data", folder, "--output", report)
    refused(done, "1 of 4 files skipped")
    stored = json.loads((report / "evaluation.json").read_text())
    assert stored["images"] == 3 and len(stored["lengths"]) == 8
    assert Image.open(report / "evaluation.png").width > 500
