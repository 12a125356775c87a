"""The transformer shared by encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from alit_kernels import cumulative_offsets
from alit_kernels.nn import GELULinear, Linear, SelfAttention
from alit_kernels.nn.block import Branch, Options, Parameters, block, in_the_open
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
    """Pre-norm transformer block: takes and returns rows, and perhaps a branch that is still to be added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        wanted: slice | None = None,
    ) -> tuple[Tensor, Branch | None]:
        if wanted is None and in_the_open(x):
            found = self._fused(x, branch, offsets, max_length)
            if found is not None:
                return found
        x = finished(x, branch)
        attended = self.attn(self.ln_1(x), offsets=offsets, max_length=max_length, queries=wanted)
        if wanted is not None:
            x = x[:, wanted] if offsets is None else positions(x, offsets, wanted)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), None

    def _fused(
        self, x: Tensor, branch: Branch | None, offsets: Tensor | None, max_length: int | None
    ) -> tuple[Tensor, Branch] | None:
        """Output of the block as one function; None if layers have other types or options, hooks, or no gradients."""
        norm_1, attn, norm_2, mlp = LAYERS(self._modules)
        if type(attn) is not SelfAttention or not attn.plain or type(mlp) is not MLP:
            return None
        out: Any = attn._modules["out_proj"]
        hidden, last = MLP_LAYERS(mlp._modules)
        parts = norm_1, attn, norm_2, mlp, out, hidden, last
        if tuple(map(type, parts)) != TYPES or any(map(_hooked, (self, *parts))):
            return None
        projection = PROJECTION(attn._parameters)
        out_weight, out_bias = PARAMETERS(out._parameters)
        if projection[1] is None or out_bias is None:
            return None
        last_weight, last_bias = PARAMETERS(last._parameters)
        parameters = Parameters(
            *(*PARAMETERS(norm_1._parameters), None if branch is None else branch.bias),
            *(*projection, out_weight),
            *(*PARAMETERS(norm_2._parameters), out_bias),
            *(*PARAMETERS(hidden._parameters), last_weight),
        )
        length = x.shape[0] if offsets is not None and max_length is None else max_length
        options = Options(attn.heads, norm_1.eps, norm_2.eps, length)
        found = block(x, branch, offsets, parameters, options)
        return None if found is None else (found[0], Branch(found[1], last_bias))


#: Getters without the attribute look-up of modules, which takes longer than some kernels; and the types expected.
LAYERS = itemgetter("ln_1", "attn", "ln_2", "mlp")
MLP_LAYERS = itemgetter("c_fc", "c_proj")
PARAMETERS = itemgetter("weight", "bias")
PROJECTION = itemgetter("in_proj_weight", "in_proj_bias")
TYPES = nn.LayerNorm, SelfAttention, nn.LayerNorm, MLP, Linear, Linear, GELULinear


def finished(x: Tensor, branch: Branch | None) -> Tensor:
    """The rows that a block returned, with the branch added to them."""
    return x if branch is None else x + (branch.rows + branch.bias)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Transformer(nn.Module):
    """Transformer blocks over (B, N, C), or over packed rows (T, C) with ``offsets`` and a static ``max_length``.

    ``wanted``: the last block computes outputs only for these positions of each sequence, (B, n, C).
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
        branch = None
        for each in blocks:
            x, branch = each(x, branch, offsets, max_length)
        return finished(*last(x, branch, offsets, max_length, wanted))


def one_behind_another(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Pack batches of sequences (B, N, C), which may differ in N: rows (T, C), their offsets, the largest N."""
    lengths = [x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64) for x in batches]
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    return rows, cumulative_offsets(torch.cat(lengths)), max(x.shape[1] for x in batches)


def initialize(module: nn.Module) -> None:
    """Initialize as published: weights truncated normal 0.02, biases 0, attention input projection Xavier uniform."""
    for layer in module.modules():
        if isinstance(layer, SelfAttention):
            layer.reset_parameters()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
