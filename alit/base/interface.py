"""Interface of base tokenizers to the adaptive tokenizer.

Shape suffixes: B images, C base channels, H x W grid, N = H W tokens in row-major order, V decoder outputs per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BaseTokens(NamedTuple):
    """2D tokens of B images.

    Attributes:
        tokens_BCHW: input of the encoder.
        code_BNC: target of the decoder: the nearest codebook rows, or the tokens themselves.
        target_BN: int64 ids of those rows; None where the base has no codebook.
    """

    tokens_BCHW: Tensor
    code_BNC: Tensor
    target_BN: Tensor | None

    def select(self, images: Tensor) -> BaseTokens:
        """The tokens of some images (a bool mask or an index over B)."""
        target_BN = None if self.target_BN is None else self.target_BN[images]
        return BaseTokens(self.tokens_BCHW[images], self.code_BNC[images], target_BN)


class Prediction(NamedTuple):
    """Decoder output read as base tokens.

    Attributes:
        decoded_BNV: logits over base codes, or channels.
        code_BNC: expected code (softmax average of the codebook), or the channels.
        nll_BN, p_target_BN: negative log-likelihood (nats) and probability of the true code; None without codebook or
            without target.
        grid: tokens down and across; None for the model's own.
    """

    decoded_BNV: Tensor
    code_BNC: Tensor
    nll_BN: Tensor | None = None
    p_target_BN: Tensor | None = None
    grid: tuple[int, int] | None = None


class BaseTokenizer(nn.Module, ABC):
    """Base tokenizer: images (B, 3, height, width) in [0, 1] to a grid of tokens and back."""

    #: Decoder outputs per token (V).
    outputs: int

    @abstractmethod
    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> BaseTokens:
        """Tokens of the images; ``sample`` draws from the posterior where there is one."""

    def tokens(self, latents_BCHW: Tensor) -> BaseTokens:
        """Base tokens of latents (B, C, H, W) that the encoder gave; raises ``ValueError`` unless overridden."""
        raise ValueError(f"base: {type(self).__name__} has a codebook")

    @abstractmethod
    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        """Read decoder outputs as base tokens."""

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions, not clamped, and the base's own loss term (scalar), for training of the base itself.

        Raises:
            ValueError: a base tokenizer without weights.
        """
        raise ValueError(f"base: {type(self).__name__} has no weights to train")

    @abstractmethod
    def pixels(self, code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, 3, height, width) of codes (expected ones included), about [0, 1], not clamped."""


class ContinuousBase(BaseTokenizer):
    """Base tokenizer without a codebook: targets are the tokens themselves, and decoder outputs are channels."""

    def tokens(self, latents_BCHW: Tensor) -> BaseTokens:
        """Base tokens of latents that the encoder gave earlier."""
        return BaseTokens(latents_BCHW, to_rows(latents_BCHW), None)

    def predict(self, decoded_BNV: Tensor, target_BN: Tensor | None) -> Prediction:
        return Prediction(decoded_BNV, decoded_BNV)


def to_rows(x_BCHW: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B, N, C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def to_grid(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape (B, N, C) to (B, C, H, W)."""
    return x_BNC.transpose(1, 2).unflatten(2, grid)
