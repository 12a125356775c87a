"""The transformer shared by encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alit_kernels import cumulative_offsets
from alit_kernels.nn import GELULinear, Linear, SelfAttention
from alit_kernels.nn.self_attention import positions

from .config import TransformerConfig


class MLP(nn.Module):
    """Two linear layers with exact GELU between them, hidden width 4 C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = GELULinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        wanted: slice | None = None,
    ) -> Tensor:
        attended = self.attn(self.ln_1(x), offsets, max_length=max_length, queries=wanted)
        if wanted is not None:
            x = x[:, wanted] if offsets is None else positions(x, offsets, wanted)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks over (B, N, C), or over packed rows (T, C) with ``offsets`` and a static ``max_length``.

    ``wanted`` are the positions of each sequence that are asked for, (B, n, C): the last block computes no others.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(
            Block(config.width, config.heads) for _ in range(config.layers)
        )

    def forward(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        max_length: int | None = None,
        wanted: slice | None = None,
    ) -> Tensor:
        *blocks, last = self.transformer
        for block in blocks:
            x = block(x, offsets, max_length)
        return last(x, offsets, max_length, wanted)


def one_behind_another(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Batches of sequences (B, N, C), N of its own each, as packed rows: (T, C), their offsets, the largest N."""
    lengths = [x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64) for x in batches]
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    return rows, cumulative_offsets(torch.cat(lengths)), max(x.shape[1] for x in batches)


def initialize(module: nn.Module) -> None:
    """Published initialisation: weights truncated normal 0.02, biases 0, attention input projection Xavier uniform."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention):
            layer.reset_parameters()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
