"""Convolutional halves of VQGAN and KL-VAE, with the keys of their published checkpoints."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle

from alit_kernels import attention

from .interface import to_grid, to_rows


def _silu(x: Tensor) -> Tensor:
    """SiLU, in place unless a gradient is needed: memory of this size costs more than the arithmetic. A hook on the
    layer before sees the changed tensor.
    """
    return nn.functional.silu(x, inplace=not x.requires_grad)


def _sum(own: Tensor, other: Tensor) -> Tensor:
    """``own + other``, in place in ``own`` when neither needs a gradient and their dtypes are equal."""
    learns = own.requires_grad or other.requires_grad
    return own + other if learns or own.dtype != other.dtype else own.add_(other)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that takes an image of one patch too: torch's refuses a group of one value, which normalizes to 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Residual block: norm, SiLU, conv, twice, plus a shortcut.

    VQGAN (``plain=True``): no biases, and where the channels change the shortcut maps the branch's output instead of
    the input: ``nin_shortcut(h) + h``. KL-VAE: the usual ``nin_shortcut(x) + h``.
    """

    def __init__(self, inputs: int, outputs: int, *, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not plain)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not plain)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if plain else inputs, outputs, 1, bias=not plain)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        if not hasattr(self, "nin_shortcut"):
            return _sum(h, x)
        return _sum(self.nin_shortcut(h if self.plain else x), h)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the grid, with residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (to_rows(layer(normed))[:, :, None] for layer in (self.q, self.k, self.v))
        out = attention(q, k, v)
        assert isinstance(out, Tensor)
        return _sum(self.proj_out(to_grid(out[:, :, 0], (x.shape[2], x.shape[3]))), x)


class Level(nn.Module):
    """The blocks of one resolution, then the change to the next: ``downsample`` or ``upsample``."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, plain: bool, attends: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for width in (inputs, *[outputs] * (blocks - 1)):
            self.block.append(ResidualBlock(width, outputs, plain=plain))
            if attends:
                self.attn.append(AttentionBlock(outputs))

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip_longest(self.block, self.attn):
            x = block(x)
            if attend is not None:
                x = attend(x)
        for change in ("downsample", "upsample"):
            if hasattr(self, change):
                x = getattr(self, change)(x)
        return x


class Strided(nn.Module):
    """KL-VAE downsampling: pad right and bottom by one, 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks, in KL-VAE with attention between them."""

    def __init__(self, channels: int, *, plain: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, plain=plain)
        self.attn_1 = nn.Identity() if plain else AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels, plain=plain)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ConvEncoder(nn.Module):
    """Convolutional encoder: images (B, 3, h, w) to features at 1 / (stem * 2^(levels - 1)) of the resolution.

    Args:
        outputs: channels of the features.
        channels, multipliers, blocks: width of level i is ``channels * multipliers[i]``, with ``blocks`` blocks each.
        plain: VQGAN layout (see :class:`ResidualBlock`), average pooling, 1x1 last convolution; else KL-VAE layout.
        attention_levels: levels with an attention block after each residual block.
        stem: side of the blocks of pixels that become channels first.
    """

    def __init__(
        self,
        outputs: int,
        *,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        plain: bool,
        attention_levels: tuple[int, ...] = (),
        stem: int = 1,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.conv_in = nn.Conv2d(3 * stem**2, channels, 3, padding=1, bias=not plain)
        self.down = nn.ModuleList()
        width = channels
        for index, multiplier in enumerate(multipliers):
            inputs, width = width, channels * multiplier
            attends = index in attention_levels
            level = Level(inputs, width, blocks, plain=plain, attends=attends)
            if index < len(multipliers) - 1:
                level.downsample = nn.AvgPool2d(2) if plain else Strided(width)
            self.down.append(level)
        self.mid = Middle(width, plain=plain)
        self.norm_out = norm(width)
        self.conv_out = (
            nn.Conv2d(width, outputs, 1) if plain else nn.Conv2d(width, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(pixel_unshuffle(x, self.stem))
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(self.norm_out(self.mid(x))))


class ConvDecoder(nn.Module):
    """Convolutional decoder: features (B, inputs, H, W) to images (B, 3, h, w); arguments of :class:`ConvEncoder`."""

    def __init__(
        self,
        inputs: int,
        *,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        plain: bool,
        stem: int = 1,
    ) -> None:
        super().__init__()
        self.stem = stem
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.mid = Middle(width, plain=plain)
        levels = []
        for index, multiplier in reversed(list(enumerate(multipliers))):
            before, width = width, channels * multiplier
            levels.append(level := Level(before, width, blocks, plain=plain))
            if index > 0:
                level.upsample = Upsample(width)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 3 * stem**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return pixel_shuffle(self.conv_out(_silu(self.norm_out(x))), self.stem)
