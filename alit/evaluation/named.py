"""Classifiers by name, of timm or torchvision: network, weights, size and colors are those of the package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

#: Fewest classes of a network: its likeliest ones are looked at.
FEWEST_CLASSES = 5


class Named(nn.Module):
    """Trained classifier, frozen, with the input size and normalization that its package states.

    Args:
        size: height and width of its input.
        mean, std: of each channel, of images in [0, 1].
        interpolation: as the package calls it; bicubic where torch has no other than that.
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.mode = "bilinear" if interpolation == "bilinear" else "bicubic"
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, classes) of images (B, 3, height, width) in [0, 1], resized as a whole."""
        resized = interpolate(
            images, self.size, mode=self.mode, antialias=True, align_corners=False
        )
        scores: Tensor = self.network((resized - self.mean) / self.std)
        return scores


def named(name: str) -> Named:
    """Load the classifier ``timm:NAME`` or ``torchvision:NAME``; the package downloads its weights unless it has them.

    Raises:
        ValueError: no such name, a package that is missing or does not fit torch, weights that cannot be had, a network
            without classes; ``classifier`` and what is wrong are named.
    """
    package, _, model = name.partition(":")
    if package not in LOADERS or not model:
        raise ValueError(f"classifier: expected timm:NAME or torchvision:NAME, got {name!r}")
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"classifier: {name} needs {error.name}: pip install {error.name}"
        ) from error
    except (ImportError, RuntimeError) as error:  # RuntimeError: ops that this torch lacks
        raise ValueError(
            f"classifier: {package} does not fit torch {torch.__version__} ({_line(error)})"
        ) from error
    return LOADERS[package](model)


def _timm(name: str) -> Named:
    timm: Any = importlib.import_module("timm")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    _check_known("timm", name, timm.is_model(name))
    try:
        network = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _without_weights(f"timm:{name}", Path(constants.HF_HUB_CACHE), error) from error
    if network.num_classes < FEWEST_CLASSES:
        raise ValueError(f"classifier: timm:{name} has {network.num_classes} classes")
    its = timm.data.resolve_model_data_config(network)
    return Named(network, its["input_size"][1:], its["mean"], its["std"], its["interpolation"])


def _torchvision(name: str) -> Named:
    models: Any = importlib.import_module("torchvision.models")
    _check_known("torchvision", name, name in models.list_models(module=models))
    weights = models.get_model_weights(name).DEFAULT
    try:
        network = models.get_model(name, weights=weights)
    except (OSError, RuntimeError, ValueError) as error:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise _without_weights(f"torchvision:{name}", folder, error) from error
    its = weights.transforms()
    side = its.crop_size[-1]
    return Named(network, (side, side), its.mean, its.std, its.interpolation.value)


LOADERS = {"timm": _timm, "torchvision": _torchvision}


def _check_known(package: str, name: str, known: bool) -> None:
    if not known:
        raise ValueError(f"classifier: {package} has no classifier {name!r}")


def _without_weights(name: str, folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"classifier: the weights of {name} are not in {folder}, and cannot be fetched ({_line(error)})"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
