"""Base tokenizer on DCT coefficients of patches: of blocks, as JPEG uses them, or of a lapped transform."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..base_config import DCTConfig
from .interface import BaseTokens, ContinuousBase, Prediction, to_grid

#: RGB in [0, 1] to luma and two chroma planes (ITU-R BT.601).
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

#: Standard deviation of a patch's mean in photographs, for luma and each chroma plane.
AMPLITUDES = (0.2, 0.065, 0.065)
#: Amplitude of luma in the lapped transform; a unit of chroma has the same squared RGB error as one of luma.
LUMA_AMPLITUDE = 0.2
#: Scale of the tokens that the encoder sees: one of many channels is to have a norm near 1.
SEEN = 1 / 8
#: Approximate deviation of lapped coefficients in photographs: at frequency 1 across a patch (it falls as 1 / frequency
#: and is 1 for the mean), and of chroma relative to luma.
FIRST_DEVIATION, CHROMA_DEVIATION = 1 / 3, 1 / 3


class BlockDCT(nn.Module):
    """Transform of patches of RGB images to their lowest orthonormal DCT-II coefficients, and back.

    Each plane is divided by one constant that gives patch means of photographs a standard deviation near 1. The filters
    are (C, 3, p, p): coefficient c of a patch is <analysis[c], patch>, and the patch is about the sum of coefficients
    times synthesis.

    Args:
        counts: coefficients of the luma and of each chroma plane, lowest frequencies first; C is their sum.
        span: range of the pixels, from black to white; a power of two.
        amplitudes: the constant of each plane, in units of ``span`` and of a patch's mean.
    """

    def __init__(
        self,
        patch_size: int,
        counts: tuple[int, int, int],
        span: float = 1.0,
        amplitudes: tuple[float, float, float] = AMPLITUDES,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.frequencies = sorted(
            itertools.product(range(patch_size), repeat=2),
            key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv[0] + uv[1], uv),
        )[: max(counts)]
        matrix = _dct_matrix(patch_size)
        basis = torch.stack([torch.outer(matrix[u], matrix[v]) for u, v in self.frequencies])
        color = torch.tensor(YCBCR, dtype=torch.float64)
        inverse = torch.linalg.inv(color)
        analysis, synthesis = [], []
        for plane, count in enumerate(counts):
            scale = span * patch_size * amplitudes[plane]
            analysis.append(color[plane][:, None, None] * basis[:count, None] / scale)
            synthesis.append(inverse[:, plane][:, None, None] * basis[:count, None] * scale)
        self.analysis: Tensor
        self.synthesis: Tensor
        self.register_buffer("analysis", torch.cat(analysis).float(), persistent=False)
        self.register_buffer("synthesis", torch.cat(synthesis).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Coefficients (B, C, H, W) of images (B, 3, height, width) with mid-gray at 0."""
        return conv2d(images, self.analysis.to(images.dtype), stride=self.patch_size)

    def inverse(self, coefficients: Tensor) -> Tensor:
        # A matrix product: patches do not overlap, and a transposed convolution on the CPU is much slower.
        filters = self.synthesis.to(coefficients.dtype)
        patches = torch.einsum("bchw, ckyx -> bkhywx", coefficients, filters)
        return patches.flatten(4, 5).flatten(2, 3)


class LappedTransform(nn.Module):
    """Lapped biorthogonal transform: images to its lowest coefficients, and back; otherwise as :class:`BlockDCT`.

    It is Malvar's (1998), a filter across the borders of patches before the block DCT (Tran, Liang and Tu, 2003): basis
    functions reach halfway into the neighboring patches, and the lowest ones end there at zero, which orthogonal ones
    do not. The filter stops at the image's edge.
    """

    def __init__(self, patch_size: int, counts: tuple[int, int, int]) -> None:
        super().__init__()
        inverse = torch.linalg.inv(torch.tensor(YCBCR, dtype=torch.float64, device="cpu"))
        norms = inverse.square().sum(0).sqrt()
        amplitudes = (LUMA_AMPLITUDE * norms[0] / norms).tolist()
        self.blocks = BlockDCT(patch_size, counts, amplitudes=amplitudes)
        #: (C,) approximate deviations of the coefficients in photographs.
        self.deviations: Tensor
        frequency = torch.tensor(self.blocks.frequencies, dtype=torch.float64, device="cpu")
        luma = FIRST_DEVIATION / frequency.square().sum(1).sqrt().clamp(min=FIRST_DEVIATION)
        planes = [luma[:count] * (CHROMA_DEVIATION if i else 1) for i, count in enumerate(counts)]
        self.register_buffer("deviations", torch.cat(planes).float(), persistent=False)
        self.border: Tensor
        self.border_inverse: Tensor
        border = _border_filter(patch_size)
        self.register_buffer("border", border.float(), persistent=False)
        self.register_buffer("border_inverse", border.inverse().float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Coefficients (B, C, H, W) of images (B, 3, height, width) with mid-gray at 0."""
        return self.blocks(self._filtered(images, self.border))

    def inverse(self, coefficients: Tensor) -> Tensor:
        return self._filtered(self.blocks.inverse(coefficients), self.border_inverse)

    def _filtered(self, images: Tensor, filters: Tensor) -> Tensor:
        """Images filtered across each patch border, half a patch to both sides, along columns and along rows."""
        filters = filters.to(images.dtype)
        size = filters.shape[0]
        for dim in (-2, -1):
            rest = images.shape[dim] - size // 2
            first, inner, last = images.tensor_split([size // 2, rest], dim)
            blocks = inner.unflatten(dim, (-1, size))
            inner = filters @ blocks if dim == -2 else blocks @ filters.T
            images = torch.cat([first, inner.flatten(dim - 1, dim), last], dim)
        return images


class DCTBase(ContinuousBase):
    """Base tokenizer: tokens and targets are each patch's lowest-frequency DCT coefficients, see :class:`BlockDCT`.

    Within a plane a squared code error then weighs all frequencies as the squared pixel error does. With a lapped
    transform it does so across planes, and the encoder's inputs and decoder's outputs are in units of each channel's
    deviation in photographs.
    """

    def __init__(self, config: DCTConfig) -> None:
        super().__init__()
        self.outputs = config.latent_channels
        counts = (config.luma, config.chroma, config.chroma)
        kind = LappedTransform if config.lapped else BlockDCT
        self.transform = kind(config.patch_size, counts)

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        return self.tokens(self.transform(images - 0.5))

    def tokens(self, latents_BCHW: Tensor) -> BaseTokens:
        if not isinstance(self.transform, LappedTransform):
            return super().tokens(latents_BCHW)
        seen_BCHW = latents_BCHW / self._deviations(latents_BCHW)[:, None, None]
        return super().tokens(latents_BCHW)._replace(tokens_BCHW=seen_BCHW * SEEN)

    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        if not isinstance(self.transform, LappedTransform):
            return super().predict(decoded_BNV, target_BN)
        return Prediction(decoded_BNV, decoded_BNV * self._deviations(decoded_BNV))

    def _deviations(self, like: Tensor) -> Tensor:
        assert isinstance(self.transform, LappedTransform)
        return self.transform.deviations.to(like.dtype)

    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.transform.inverse(to_grid(code_BNC, grid)) + 0.5


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix (size, size): row u, column x is c(u) cos(pi (2 x + 1) u / (2 size))."""
    x, u = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi * (2 * x + 1) * u / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _border_filter(size: int) -> Tensor:
    """Filter (size, size) of a border: butterflies around a rotation of the odd half, its lowest part times sqrt(2)."""
    half = size // 2
    same = torch.eye(half, dtype=torch.float64)
    mirrored = same.flip(0)
    x = torch.arange(half, dtype=torch.float64)
    dct4 = torch.cos(math.pi * (2 * x + 1) * (2 * x[:, None] + 1) / (4 * half))
    dct4 = dct4 * math.sqrt(2 / half)
    dct4[0] *= math.sqrt(2)
    rotation = mirrored @ _dct_matrix(half).T @ dct4 @ mirrored
    butterflies = torch.cat([torch.cat([same, mirrored], 1), torch.cat([mirrored, -same], 1)])
    return 0.5 * butterflies @ torch.block_diag(same, rotation) @ butterflies
