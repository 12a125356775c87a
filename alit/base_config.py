"""Configuration of base tokenizers, and upper bounds of sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from .checks import Checked, Range, check_number

#: Upper bounds: far beyond any model, and low enough that a damaged configuration is refused, not built.
MAX_SIZE = 2**16  # of widths, channels, sides of images, counts of tokens
MAX_CODES = 2**31 - 1
MAX_LEVELS = 8
MAX_PATCH = 64
Size = Annotated[int, Range(1, MAX_SIZE)]
Codes = Annotated[int, Range(1, MAX_CODES)]


@dataclass(frozen=True)
class Convolutional(Checked):
    """Configuration of convolutional base tokenizers: level i of encoder and decoder has ``channels * multipliers[i]``
    channels and ``blocks`` residual blocks.
    """

    latent_channels: Size = 256
    channels: Size = 128
    multipliers: Annotated[tuple[int, ...], Range(1, MAX_SIZE)] = (1, 1, 2, 2, 4)
    blocks: Annotated[int, Range(1, 16)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.multipliers)
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(
                f"multipliers: expected at least one level and at most {MAX_LEVELS}, got {levels or 'none'}"
            )
        if self.channels % 32:
            raise ValueError(
                f"channels: expected a multiple of 32, the groups that are normalized, got {self.channels}"
            )
        if self.channels * max(self.multipliers) > MAX_SIZE:
            raise ValueError(f"multipliers: expected at most {MAX_SIZE} channels in a level")
        if self.patch_size > MAX_PATCH:
            raise ValueError(
                f"patch_size: expected at most {MAX_PATCH} pixels, got {self.patch_size}"
            )

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class VQGANConfig(Convolutional):
    """Configuration of a VQGAN base tokenizer."""

    kind: Literal["vqgan"] = "vqgan"
    num_codes: Codes = 1024


@dataclass(frozen=True)
class KLVAEConfig(Convolutional):
    """Configuration of a KL-VAE base tokenizer: tokens are posterior samples times ``scale``; the ``attention_levels``
    have self-attention.

    ``stem``: side of the blocks of pixels whose values are the channels of the first convolution's input and of the
    last one's output (space to depth). 1, as published, convolves pixels; 4 spends a sixteenth as much on each of them.

    ``transform``: a fixed linear path beside encoder and decoder, the block DCT; they learn what it misses. Published:
    none.
    """

    kind: Literal["vae"] = "vae"
    latent_channels: Size = 16
    scale: Annotated[float, Range(0, math.inf)] = 0.2325
    attention_levels: Annotated[tuple[int, ...], Range(0, MAX_LEVELS - 1)] = (4,)
    stem: Annotated[int, Range(1, MAX_PATCH)] = 1
    transform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale:
            raise ValueError("scale: expected a number above 0, got 0")

    @property
    def patch_size(self) -> int:
        return self.stem * super().patch_size


@dataclass(frozen=True)
class DCTConfig(Checked):
    """Configuration of a base tokenizer without weights: lowest DCT coefficients of a patch, per luma and chroma plane.

    ``lapped``: the transform overlaps neighboring patches, so that no border shows, and all planes are in units of
    equal squared RGB error. False: blocks, each plane in units of its deviation in photographs.
    """

    kind: Literal["dct"] = "dct"
    patch_size: Annotated[int, Range(1, MAX_PATCH)] = 16
    luma: Size = 28
    chroma: Size = 6
    lapped: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("luma", "chroma"):
            check_number(name, getattr(self, name), int, 1, self.patch_size**2)
        if self.lapped and self.patch_size % 2:
            raise ValueError(
                f"patch_size: a lapped transform needs an even one, got {self.patch_size}"
            )

    @property
    def latent_channels(self) -> int:
        return self.luma + 2 * self.chroma


BaseConfig = VQGANConfig | KLVAEConfig | DCTConfig
BASES: dict[str, type[VQGANConfig] | type[KLVAEConfig] | type[DCTConfig]] = {
    base.kind: base for base in (VQGANConfig, KLVAEConfig, DCTConfig)
}
