"""The transformer shared by encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear

from alit_kernels.nn import SelfAttention
from alit_kernels.nn.self_attention import positions

from .config import TransformerConfig


class _GELULinear(torch.autograd.Function):
    """``linear(gelu(x))``; keeps x, and computes gelu(x) again in the backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        # Under autocast the product is of another type than x and the weight.
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if wants_x:
            grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        if wants_weight:
            grad_weight = rows.t() @ gelu(x).reshape(-1, x.shape[-1]).to(grad.dtype)
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None


class GELULinear(nn.Linear):
    """Linear layer after an exact GELU.

    What the GELU returns, a quarter of what a transformer block would keep for its backward, is computed again there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return _GELULinear.apply(x, self.weight, self.bias)
        return super().forward(gelu(x))


class MLP(nn.Module):
    """Two linear layers with exact GELU between them, hidden width 4 C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
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


def initialise(module: nn.Module) -> None:
    """Published initialisation: weights truncated normal 0.02, biases 0, attention input projection Xavier uniform."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention):
            layer.reset_parameters()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
