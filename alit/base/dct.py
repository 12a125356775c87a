"""A base tokenizer without weights: block-DCT coefficients, as JPEG uses them, on patches of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import DCTConfig
from .interface import BaseTokenizer, BaseTokens, Prediction, to_grid, to_rows

#: RGB in [0, 1] to luma and two chroma planes (ITU-R BT.601).
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

#: Standard deviation of a patch's mean in photographs, for luma and each chroma plane.
AMPLITUDES = (0.2, 0.065, 0.065)


class DCTBase(BaseTokenizer):
    """Tokens and targets are the lowest-frequency orthonormal DCT-II coefficients of each patch, normalised.

    Images are centred on mid-grey, and each plane is divided by one constant that gives patch means a standard
    deviation near 1; within a plane a squared code error then weighs all frequencies as the squared pixel error does.
    """

    def __init__(self, config: DCTConfig) -> None:
        super().__init__()
        self.patch_size, self.counts = (
            config.patch_size,
            (config.luma, config.chroma, config.chroma),
        )
        self.outputs = config.latent_channels
        analysis, synthesis = dct_filters(self.patch_size, self.counts)
        self.analysis: Tensor
        self.synthesis: Tensor
        self.register_buffer("analysis", analysis, persistent=False)
        self.register_buffer("synthesis", synthesis, persistent=False)

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        analysis = self.analysis.to(images.dtype)
        return self.tokens(
            torch.nn.functional.conv2d(images - 0.5, analysis, stride=self.patch_size)
        )

    def tokens(self, coefficients_BCHW: Tensor) -> BaseTokens:
        """Base tokens of coefficients that were computed earlier."""
        return BaseTokens(coefficients_BCHW, to_rows(coefficients_BCHW), None)

    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        return Prediction(decoded_BNV, decoded_BNV)

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        coefficients = to_grid(code_BNC, grid)
        synthesis = self.synthesis.to(code_BNC.dtype)
        return (
            torch.nn.functional.conv_transpose2d(coefficients, synthesis, stride=self.patch_size)
            + 0.5
        )


def dct_filters(patch_size: int, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis, each (C, 3, p, p): coefficient c of an RGB patch is <analysis[c], patch>, and the patch
    is about the sum of coefficients times synthesis.

    Args:
        counts: coefficients of the luma and of each chroma plane, lowest frequencies first; C is their sum.
    """
    frequencies = sorted(
        ((u, v) for u in range(patch_size) for v in range(patch_size)),
        key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv[0] + uv[1], uv),
    )
    matrix = _dct_matrix(patch_size)
    largest = frequencies[: max(counts)]
    basis = torch.stack([torch.outer(matrix[u], matrix[v]) for u, v in largest])
    colour = torch.tensor(YCBCR, dtype=torch.float64)
    inverse = torch.linalg.inv(colour)
    analysis, synthesis = [], []
    for plane, count in enumerate(counts):
        scale = patch_size * AMPLITUDES[plane]
        analysis.append(colour[plane][:, None, None] * basis[:count, None] / scale)
        synthesis.append(inverse[:, plane][:, None, None] * basis[:count, None] * scale)
    return torch.cat(analysis).float(), torch.cat(synthesis).float()


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II: row u, column x is c(u) cos(pi (2 x + 1) u / (2 size))."""
    x, u = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (2 * x + 1) * u / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
