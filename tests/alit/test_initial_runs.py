"""Runs that start from the transform coder, and the images that the coder is fitted to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer
from alit.images import save_image, to_image
from alit.training import TrainingConfig, initialization, models, train
from alit.training.image_data import ImageFolder
from alit.training.models import build
from tests.helpers.coder import GRID, OPTIONS, smooth_images
from tests.helpers.hub_server import Hub


def described(folder: Path, **options: Any) -> TrainingConfig:
    """Configuration of a short run on a folder of images, with a negligible learning rate."""
    model = {"size": "nano", **OPTIONS}
    model |= {name: dataclasses.asdict(model[name]) for name in ("base", "encoder", "decoder")}
    fields: dict[str, Any] = {
        "model": model,
        "initialization": "transform_coder",
        "data": str(folder / "photos"),
        "output": str(folder / "run"),
        "learning_rate": 1e-9,
        "steps": 2,
        "batch_size": 2,
        "iterations_per_step": 1,
        "workers": 0,
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
    }
    return TrainingConfig(**{**fields, **options})


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that holds ``photos``, with images and an invalid file; the coder is fitted to few of them."""
    monkeypatch.setattr(models, "INITIAL_SAMPLE", 40)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(smooth_images(20)):
        save_image(to_image(image), tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "no.png").write_bytes(b"not an image")
    return tmp_path


def test_a_run_starts_from_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coder is fitted to the run's own images with its seed, and not again when the run resumes."""
    config = described(photos, steps=0)
    torch.manual_seed(config.seed)
    start = build(config, None)
    assert start.pre_quantizer_mlp.weight.count_nonzero() <= 2 * start.config.code_dim
    assert train(config).steps == 0, "no step at all writes the start"
    after = AdaptiveTokenizer.from_pretrained(photos / "run" / "model.safetensors")
    for name, weight in start.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight), name
    monkeypatch.setattr(models, "as_transform_coder", lambda *_: pytest.fail("made again"))
    longer = dataclasses.replace(config, steps=3)
    assert train(longer, resume=True, allow_changes=True).steps == 3
    last = AdaptiveTokenizer.from_pretrained(photos / "run" / "model.safetensors")
    for name, weight in start.named_parameters():
        torch.testing.assert_close(last.get_parameter(name), weight, atol=1e-6, rtol=0)


def test_the_images_of_a_start(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coder gets as many images as wanted, those of the fit from the whole folder, without unreadable ones."""
    given: list[tuple[Tensor, Tensor]] = []
    read: list[int] = []

    def load(folder: ImageFolder, index: int, random: Any, actual: Any = ImageFolder.load) -> Any:
        read.append(index)
        return actual(folder, index, random)

    monkeypatch.setattr(models, "INITIAL_BATCH", 8)
    monkeypatch.setattr(models, "INITIAL_FIT", 9)
    monkeypatch.setattr(models, "as_transform_coder", lambda _, *x: given.append(x))
    monkeypatch.setattr(ImageFolder, "load", load)
    build(described(photos), None)
    assert len(read) == 40 and set(read) == set(range(21))
    assert min(read[:16]) < 5 and max(read[:16]) > 15 and len(set(read[:16])) > 8
    tokens_BNC, images = given[0]
    assert tokens_BNC.shape[1:] == (GRID**2, 18)
    assert 30 <= len(tokens_BNC) < 40, "no.png is left out"
    assert images.shape[1:] == (3, 64, 64) and 9 <= len(images) <= 16
    assert images.min() >= 0 and images.max() <= 1
    with pytest.raises(ValueError, match="data: none of 21 images can be read"):
        build(described(photos, max_megapixels=1e-3), None)  # as the run reads them


def test_magnified_parts() -> None:
    """Magnified parts are smooth and have random colors, even of a gray image."""
    chance = np.random.default_rng(0)
    gray = torch.from_numpy(chance.random((1, 64, 64))).float().expand(3, -1, -1)
    for _ in range(20):
        image = models._magnified(gray, chance)
        assert image.shape == gray.shape and image.min() >= 0 and image.max() <= 1
        assert image.diff(dim=2).abs().mean() < 0.1 * gray.diff(dim=2).abs().mean()
        assert (image - image.mean(0)).abs().mean() > 0.01
    flat = models._magnified(torch.full((3, 8, 8), 0.5), chance)
    torch.testing.assert_close(flat, flat[:, :1, :1].expand_as(flat))


def test_unfit_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: transform_coder needs a folder"):
        build(dataclasses.replace(described(tmp_path), data=None), None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "no.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="data: none of 1 images can be read"):
        build(described(tmp_path, batch_size=1), None)
    with pytest.raises(ValueError, match="data: expected at least a batch of 2 images, got 1"):
        build(described(tmp_path), None)
    with pytest.raises(ValueError, match="initialization: expected 'published' where start_from"):
        TrainingConfig(initialization="transform_coder", start_from="nano")


@pytest.mark.parametrize("field", ["start_from", "base_from"])
def test_what_a_run_starts_from_is_never_asked_of_the_hub(
    field: str, hub: Hub, content: bytes
) -> None:
    hub.add("me/other", content)
    with pytest.raises(FileNotFoundError, match="me/other: no such file, nor the name of ship"):
        build(TrainingConfig(**{field: "me/other"}), None)
    assert not hub.asked


def test_the_shipped_recipe_fits() -> None:
    """The shipped recipe's model can start from the coder; the second run trains no base weights."""
    first, second = (
        TrainingConfig.read(Path(models.__file__).parent / "configs" / "nano" / name)
        for name in ("1-coder.yaml", "2-filter.yaml")
    )
    assert first.initialization == "transform_coder" and not second.train_base
    model = models._described(first.model)
    initialization._check(model)
    assert model.any_length and second.tail_drop > 0
    assert model.pixel_filter and not second.train_decoder
    assert first.steps == 0
