"""A base tokenizer without weights: block-DCT coefficients, as JPEG uses them, on patches of any size."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from ..config import DCTConfig
from .interface import BaseTokens, ContinuousBase, to_grid

#: RGB in [0, 1] to luma and two chroma planes (ITU-R BT.601).
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

#: Standard deviation of a patch's mean in photographs, for luma and each chroma plane.
AMPLITUDES = (0.2, 0.065, 0.065)


class BlockDCT(nn.Module):
    """Patches of RGB images to their lowest orthonormal DCT-II coefficients, and back.

    Each plane is divided by one constant that gives patch means of photographs a standard deviation near 1. The filters
    are (C, 3, p, p): coefficient c of a patch is <analysis[c], patch>, and the patch is about the sum of coefficients
    times synthesis.

    Args:
        counts: coefficients of the luma and of each chroma plane, lowest frequencies first; C is their sum.
        span: of the pixels, from black to white; a power of two.
    """

    def __init__(self, patch_size: int, counts: tuple[int, int, int], span: float = 1.0) -> None:
        super().__init__()
        self.patch_size = patch_size
        frequencies = sorted(
            itertools.product(range(patch_size), repeat=2),
            key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv[0] + uv[1], uv),
        )
        matrix = _dct_matrix(patch_size)
        basis = torch.stack(
            [torch.outer(matrix[u], matrix[v]) for u, v in frequencies[: max(counts)]]
        )
        color = torch.tensor(YCBCR, dtype=torch.float64)
        inverse = torch.linalg.inv(color)
        analysis, synthesis = [], []
        for plane, count in enumerate(counts):
            scale = span * patch_size * AMPLITUDES[plane]
            analysis.append(color[plane][:, None, None] * basis[:count, None] / scale)
            synthesis.append(inverse[:, plane][:, None, None] * basis[:count, None] * scale)
        self.analysis: Tensor
        self.synthesis: Tensor
        self.register_buffer("analysis", torch.cat(analysis).float(), persistent=False)
        self.register_buffer("synthesis", torch.cat(synthesis).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width), mid-grey at 0, to (B, C, H, W)."""
        return conv2d(images, self.analysis.to(images.dtype), stride=self.patch_size)

    def inverse(self, coefficients: Tensor) -> Tensor:
        filters = self.synthesis.to(coefficients.dtype)
        return conv_transpose2d(coefficients, filters, stride=self.patch_size)


class DCTBase(ContinuousBase):
    """Tokens and targets are the lowest-frequency DCT coefficients of each patch, see :class:`BlockDCT`.

    Within a plane a squared code error then weighs all frequencies as the squared pixel error does.
    """

    def __init__(self, config: DCTConfig) -> None:
        super().__init__()
        self.outputs = config.latent_channels
        self.transform = BlockDCT(config.patch_size, (config.luma, config.chroma, config.chroma))

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        return self.tokens(self.transform(images - 0.5))

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.transform.inverse(to_grid(code_BNC, grid)) + 0.5


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: row u, column x is c(u) cos(pi (2 x + 1) u / (2 size))."""
    x, u = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (2 * x + 1) * u / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
