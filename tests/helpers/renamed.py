"""Functions shared by the quantizers of ``peers.py`` and ``lucidrains.py``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def known_as(name: str, module: str = "") -> Callable[[type], type]:
    def rename(cls: type) -> type:
        cls.__qualname__ = cls.__name__ = name
        cls.__module__ = module or cls.__module__
        return cls

    return rename


def squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    """Squared distances (N, K), by the expansion of the square that all of these quantizers use."""
    return z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.t()


def through(z: Tensor, quantized: Tensor) -> Tensor:
    return z + (quantized - z).detach()
