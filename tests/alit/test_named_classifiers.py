"""``alit analyze --classifier``: networks of timm and torchvision by name, with imitated packages."""

from __future__ import annotations

import importlib
import re
import sys
import urllib.error
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alit.evaluation import classifier
from tests.helpers.commands import refused, run
from tests.helpers.models import model

MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


def network() -> Any:
    made: Any = nn.Sequential(nn.Conv2d(3, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made.num_classes = 7
    return made


class Packages:
    """Imitation of both packages, with the classifier "small"; ``error``: raised by loading its weights."""

    def __init__(self) -> None:
        self.network = network()
        self.error: Exception | None = None
        self.asked: list[Any] = []

    def create(self, name: str, **options: Any) -> nn.Module:
        self.asked.append((name, options))
        if self.error is not None:
            raise self.error
        made: nn.Module = self.network
        return made


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Packages:
    found = Packages()
    config = {"input_size": (3, 12, 20), "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    timm = ModuleType("timm")
    timm.__dict__.update(
        is_model=lambda name: name == "small",
        create_model=found.create,
        data=SimpleNamespace(resolve_model_data_config=lambda made: dict(config)),
    )
    preset = SimpleNamespace(
        crop_size=[16], mean=MEAN, std=STD, interpolation=SimpleNamespace(value="bilinear")
    )
    models = ModuleType("torchvision.models")
    weights = SimpleNamespace(transforms=lambda: preset)
    models.__dict__.update(
        list_models=lambda module: ["small"] if module is models else ["small", "detector"],
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=weights),
        get_model=found.create,
    )
    torchvision = ModuleType("torchvision")
    torchvision.__dict__.update(models=models)
    for name, module in (
        ("timm", timm),
        ("torchvision", torchvision),
        ("torchvision.models", models),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [("timm:small", (12, 20), "bicubic"), ("torchvision:small", (16, 16), "bilinear")],
)
def test_images_come_in_the_size_and_colors_of_the_package(
    name: str, size: tuple[int, int], mode: str, packages: Packages
) -> None:
    its = classifier(name=name)
    assert its.classifier is not None and its.classifier_name == name and not its.left_out
    images = torch.rand(2, 3, 30, 30)
    resized = nn.functional.interpolate(images, size, mode=mode, antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    scores = packages.network((resized - mean) / std)
    torch.testing.assert_close(its.classifier(images), scores)
    assert torch.equal(its.classes(images, 5), scores.topk(5).indices)  # type: ignore[arg-type]
    assert not its.classifier.training and not any(
        p.requires_grad for p in its.classifier.parameters()
    )
    ((asked, options),) = packages.asked
    assert asked == "small" and (options.get("pretrained") or options.get("weights") is not None)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no network"),
        RuntimeError("no pretrained\nweights"),
        FileNotFoundError("not in the cache"),
    ],
)
def test_weights_that_cannot_be_had(
    package: str, error: Exception, packages: Packages, tmp_path: Path, monkeypatch: Any
) -> None:
    folders = {"timm": tmp_path / "hub", "torchvision": tmp_path / "torch" / "checkpoints"}
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folders["timm"]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    packages.error = error
    place, said = re.escape(str(folders[package])), re.escape(" ".join(str(error).split()))
    expected = rf"^classifier: the weights of {package}:small are not in {place}, .* \({said}\)$"
    with pytest.raises(ValueError, match=expected):
        classifier(name=f"{package}:small")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", "expected timm:NAME or torchvision:NAME, got 'small'"),
        ("timm:", "expected timm:NAME or torchvision:NAME, got 'timm:'"),
        ("keras:small", "expected timm:NAME or torchvision:NAME, got 'keras:small'"),
        ("timm:detector", "timm has no classifier 'detector'"),
        ("torchvision:detector", "torchvision has no classifier 'detector'"),
    ],
)
@pytest.mark.usefixtures("packages")
def test_names_of_none(name: str, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m.safetensors")
    options = ("--data", tmp_path, "-o", tmp_path / "page", "--classifier", name)
    refused(run("analyze", tmp_path / "m.safetensors", *options), f"error: classifier: {message}")
    assert not (tmp_path / "page").exists()


def test_a_network_without_classes(packages: Packages) -> None:
    packages.network.num_classes = 0
    with pytest.raises(ValueError, match=r"^classifier: timm:small has 0 classes$"):
        classifier(name="timm:small")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_packages_that_cannot_be_imported(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages that are missing, lack a dependency or were made for another torch raise an error that says so."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    for source, message in (
        ("raise ModuleNotFoundError('no', name='gone')", "needs gone: pip install gone"),
        ("raise RuntimeError('operator nms does not exist')", "does not fit torch .*nms does"),
        ("raise ImportError('cannot import name')", "does not fit torch .*cannot import name"),
    ):
        (tmp_path / f"{package}.py").write_text(source)
        sys.path_importer_cache.clear()
        with pytest.raises(ValueError, match=rf"^classifier: {package}.* {message}"):
            classifier(name=f"{package}:small")
    monkeypatch.setitem(sys.modules, package, None)
    expected = rf"^classifier: {package}:small needs {package}: pip install {package}$"
    with pytest.raises(ValueError, match=expected):
        classifier(name=f"{package}:small")
