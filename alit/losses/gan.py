"""PatchGAN discriminator (Isola et al., 2017), hinge losses, adaptive weight (Esser et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import relu


class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator: images (B, 3, height, width) to one logit per patch (B, 1, h, w).

    4x4 convolutions with padding 1: three with stride 2, two with stride 1; BatchNorm after all but the first and the
    last, LeakyReLU 0.2 between. Keys ``main.*`` as published.

    Args:
        filters: of the first convolution; doubled by each of the next three.
    """

    def __init__(self, filters: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, filters, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(3):
            inputs, outputs = filters * 2**index, filters * 2 ** (index + 1)
            stride = 2 if index < 2 else 1
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(filters * 8, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, mean=1.0, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator's logits: 0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Parameter) -> Tensor:
    """Ratio of the two losses' gradient norms at the last layer, |r| / (|a| + 1e-4) clamped to [0, 1e4], detached."""
    (r,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (a,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (r.norm() / (a.norm() + 1e-4)).clamp(0.0, 1e4).detach()
