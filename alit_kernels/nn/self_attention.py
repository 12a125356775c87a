"""Multi-head self-attention over dense or packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention import attention, varlen_attention


class SelfAttention(nn.Module):
    """Self-attention with the parameters of ``torch.nn.MultiheadAttention`` (same names, shapes and state dict).

    Args:
        width: channels C.
        heads: number of heads; must divide ``width``.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of ``torch.nn.MultiheadAttention``: Xavier uniform input projection, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, *, max_length: int | None = None
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: (B, N, C); or packed rows (T, C) with ``offsets``.
            offsets: (B + 1,) int32, see :func:`alit_kernels.varlen_attention`.
            max_length: static bound for the longest packed sequence; T by default.

        Returns:
            The shape of ``x``.
        """
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if offsets is None:
            out = attention(q, k, v)
        else:
            out = varlen_attention(
                q, k, v, offsets, max_length=x.shape[0] if max_length is None else max_length
            )
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(-2))
