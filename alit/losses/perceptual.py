"""LPIPS (Zhang et al., 2018) on VGG16. The heads' weights come with torchmetrics or lpips, VGG16's from PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ..console import console

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
#: Packages that carry the weights of the heads, and their file in each.
HEADS = {
    "torchmetrics": "functional/image/lpips_models/vgg.pth",
    "lpips": "weights/v0.1/vgg.pth",
}
#: Convolutions of VGG16 up to its fifth tap, by their number in torchvision's ``features``: outputs of each.
SLICES: tuple[dict[int, int], ...] = (
    {0: 64, 2: 64},
    {5: 128, 7: 128},
    {10: 256, 12: 256, 14: 256},
    {17: 512, 19: 512, 21: 512},
    {24: 512, 26: 512, 28: 512},
)
#: Mean and deviation of ImageNet, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Perceptual(nn.Module):
    """LPIPS distance, frozen; keys as in the ``lpips`` package (``net.slice1.0.weight``, ``lin0.model.1.weight``).

    Weights are random until :meth:`load_pretrained` or ``load_state_dict``.

    Args:
        unit_range: images in [0, 1] go in as they are (published training) instead of as [-1, 1].
        dropout: the dropout before the heads follows the training mode (published training); else there is none.
    """

    def __init__(self, *, unit_range: bool = False, dropout: bool = False) -> None:
        super().__init__()
        self.unit_range, self.dropout = unit_range, dropout
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.net = nn.Module()
        inputs = 3
        for number, convolutions in enumerate(SLICES):
            part = nn.Module()
            for name, outputs in convolutions.items():
                part.add_module(str(name), nn.Conv2d(inputs, outputs, 3, padding=1))
                inputs = outputs
            self.net.add_module(f"slice{number + 1}", part)
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(inputs, 1, 1, bias=False))
            self.add_module(f"lin{number}", head)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Perceptual:
        super().train(mode and self.dropout)
        return self

    @staticmethod
    def at_hand() -> bool:
        """True if VGG16's weights have been fetched already."""
        return (Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16).name).is_file()

    def load_pretrained(self) -> Perceptual:
        """Load the published weights; VGG16's are fetched once, into ``torch.hub``'s folder.

        Raises:
            ValueError: they cannot be had; the message says what to do.
        """
        state = dict(torch.load(_heads(), map_location="cpu", weights_only=True))
        try:
            vgg = torch.hub.load_state_dict_from_url(
                VGG16, map_location="cpu", check_hash=True, progress=console.draws()
            )
        except (OSError, RuntimeError) as error:
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise ValueError(
                f"perceptual: the weights of VGG16 cannot be had ({error}); put {VGG16} into {folder}"
            ) from error
        for number, convolutions in enumerate(SLICES, 1):
            for name in convolutions:
                for kind in ("weight", "bias"):
                    state[f"net.slice{number}.{name}.{kind}"] = vgg[f"features.{name}.{kind}"]
        self.load_state_dict(state)
        return self

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair, 0 for equal ones: (B,). Images (B, 3, height, width) in [0, 1]."""
        distance = images.new_zeros(images.shape[0], dtype=torch.float32)
        x, y = self._scaled(images), self._scaled(reconstructions)
        for number in range(len(SLICES)):
            x, y = self._slice(number, x), self._slice(number, y)
            difference = (_unit(x) - _unit(y)).square()
            head = self.get_submodule(f"lin{number}.model")
            distance = distance + head(difference).mean((1, 2, 3))
        return distance

    def _scaled(self, images: Tensor) -> Tensor:
        return ((images if self.unit_range else 2 * images - 1) - self.shift) / self.scale

    def _slice(self, number: int, x: Tensor) -> Tensor:
        if number > 0:
            x = nn.functional.max_pool2d(x, 2)
        for convolution in self.net.get_submodule(f"slice{number + 1}").children():
            x = relu(convolution(x))
        return x


def _heads() -> Path:
    """File of the heads' weights; the packages that carry it are not imported: they need torchvision, or time."""
    for name, place in HEADS.items():
        package = importlib.util.find_spec(name)
        if package is not None and package.origin is not None:
            file = Path(package.origin).parent / place
            if file.is_file():
                return file
    raise ValueError(
        "perceptual: the weights of LPIPS's heads come with torchmetrics: pip install 'alit[train]'"
    )


def _unit(features: Tensor) -> Tensor:
    """Features divided by (their norm over channels + 1e-10); the gradient of a zero vector is zero, not NaN."""
    features = features.float()
    squared = features.square().sum(1, keepdim=True)
    norm = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return features / (norm + 1e-10)
