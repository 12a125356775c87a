"""Metrics that need the weights of other networks: LPIPS, and the Frechet distance of Inception features (rFID)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses import Perceptual

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)

MISFIT = "a torchvision that does not fit torch does that: replace it, or pip uninstall torchvision"


class Networks(NamedTuple):
    """Networks at hand.

    Attributes:
        perceptual: (pictures, reconstructions), each (B, 3, height, width) in [0, 1], to distances (B,).
        inception: pictures (B, 3, height, width) uint8 to features (B, F).
        left_out: why the others are not; a line each.
    """

    perceptual: nn.Module | None = None
    inception: nn.Module | None = None
    left_out: tuple[str, ...] = ()


def networks(device: torch.device | str = "cpu", *, fetch: bool = False) -> Networks:
    """LPIPS and Inception, where their weights are in ``torch.hub``'s folder.

    Args:
        fetch: download what is not there.

    Raises:
        ValueError: ``fetch``, and one of them cannot be had; the message says what to do.
    """
    found: list[nn.Module | None] = []
    left_out: list[str] = []
    options: tuple[tuple[str, Callable[[], bool], Callable[[], nn.Module]], ...] = (
        ("LPIPS", Perceptual.at_hand, lambda: Perceptual().load_pretrained()),
        ("rFID", _inception_at_hand, _inception),
    )
    for name, at_hand, load in options:
        network = None
        if not (fetch or at_hand()):
            left_out.append(f"{name}: its weights are not here; --fetch gets them")
        else:
            try:
                network = load().to(device).eval()
            except ValueError as error:
                if fetch:
                    raise
                left_out.append(f"{name}: {error}")
        found.append(network)
    return Networks(found[0], found[1], tuple(left_out))


def _inception_at_hand() -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION).name).is_file()


def _inception() -> nn.Module:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"rFID: {error}; it needs torchmetrics and torch-fidelity: pip install torchmetrics torch-fidelity"
        ) from error
    except Exception as error:  # torchvision, which both import, may not fit torch; no network
        raise ValueError(
            f"rFID: Inception cannot be had ({type(error).__name__}: {error}); it needs torch-fidelity, a torchvision"
            f" that fits torch, and {INCEPTION} in {torch.hub.get_dir()}/checkpoints"
        ) from error


class Frechet:
    """Frechet distance between the features of pictures and of each of several sets of reconstructions.

    Args:
        sets: how many; float64 statistics of F x F stay in memory, 135 MB for each with Inception's 2048 features.
    """

    def __init__(self, inception: nn.Module, sets: int) -> None:
        self.inception, self.sets = inception, sets
        self.metrics: list[Any] = []

    def add(self, pictures: Tensor, reconstructions: list[Tensor]) -> None:
        """(B, 3, height, width) in [0, 1], of 8 bits."""
        real = self.features(pictures)
        if not self.metrics:
            self.metrics = [_metric(real.shape[1]) for _ in range(self.sets)]
        for metric, images in zip(self.metrics, reconstructions, strict=True):
            metric.update(real, real=True)
            metric.update(self.features(images), real=False)

    def features(self, images: Tensor) -> Tensor:
        device = next(self.inception.parameters()).device
        levels = (images * 255).round().to(torch.uint8)
        return self.inception(levels.to(device)).cpu().double()

    def distances(self) -> list[float]:
        """Of each set.

        Raises:
            ValueError: fewer than two pictures.
        """
        if not self.metrics or self.metrics[0].real_features_num_samples < 2:
            raise ValueError("data: rFID is a distance of distributions: expected two pictures")
        return [max(0.0, float(metric.compute())) for metric in self.metrics]


class _Features(nn.Identity):
    """In place of a network: features are computed once and given to several metrics."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count


def _metric(features: int) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise ValueError("rFID needs torchmetrics: pip install 'alit[eval]'") from error
    except Exception as error:
        raise ValueError(f"rFID: torchmetrics cannot be imported ({error}); {MISFIT}") from error
    return FrechetInceptionDistance(feature=_Features(features))
