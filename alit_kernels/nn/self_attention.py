"""Multi-head self-attention over dense, padded or packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention, varlen_attention
from ..attention.op import self_attention
from ..ragged import pack, unpack
from .linear import Linear, linear


class SelfAttention(nn.Module):
    """Self-attention with the parameters of ``torch.nn.MultiheadAttention`` (same names, shapes and state dict).

    One product makes queries, keys and values; attention reads them in place. It has no dropout, no attention weights
    among its outputs, and ``batch_first`` is the default.

    Args:
        width: channels C.
        heads: number of heads; must divide ``width``.
        bias: whether both projections have biases.
        batch_first: dense input is (B, N, C); otherwise (N, B, C), which is not copied either.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self, width: int, heads: int, *, bias: bool = True, batch_first: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.heads = heads
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width)) if bias else None
        self.out_proj = Linear(width, width, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of ``torch.nn.MultiheadAttention``: Xavier uniform input projection, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        max_length: int | None = None,
        lengths: Tensor | None = None,
        queries: slice | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: (B, N, C), or (N, B, C) without ``batch_first``; or packed rows (T, C) with ``offsets``.
            offsets: (B + 1,) int32, see :func:`alit_kernels.varlen_attention`.
            max_length: static bound for the longest packed sequence; T by default.
            lengths: (B,) tokens of each sequence of a padded dense ``x``. The rows beyond are not read and are zero in
                the result; attention computes none of them.
            queries: positions of each sequence whose result is wanted, the others being keys and values alone; all by
                default. With packed rows a slice of start and stop, and no sequence may end before its stop.

        Returns:
            The shape of ``x``; with ``queries`` of these positions alone, (B, n, C) for packed sequences too.

        Raises:
            ValueError: both ``offsets`` and ``lengths``, or ``queries`` with ``lengths``; a slice without its ends.
        """
        if queries is not None and lengths is not None:
            raise ValueError("queries: expected None with padded input (lengths), got a slice")
        if offsets is not None:
            if lengths is not None:
                raise ValueError("lengths: expected None with packed input (offsets), got a tensor")
            longest = x.shape[0] if max_length is None else max_length
            if queries is not None:
                return self._some_of_packed(x, offsets, longest, queries)
            return self._packed(x, offsets, longest)
        if lengths is not None:
            padded = x if self.batch_first else x.transpose(0, 1)
            batch, length = padded.shape[:2]
            rows, offsets = pack(padded, lengths, capacity=batch * length)
            padded = unpack(self._packed(rows, offsets, length), offsets, max_length=length)
            return padded if self.batch_first else padded.transpose(0, 1)
        if queries is None:
            qkv = self._project(x)
            out: Any = self_attention(qkv if self.batch_first else qkv.transpose(0, 1))
        else:
            wanted = x[:, queries] if self.batch_first else x[queries]
            apart = self._project_apart(wanted, x)
            out = attention(*(t if self.batch_first else t.transpose(0, 1) for t in apart))
        return self.out_proj((out if self.batch_first else out.transpose(0, 1)).flatten(-2))

    def _packed(self, x: Tensor, offsets: Tensor, max_length: int) -> Tensor:
        out = self_attention(self._project(x), offsets, max_length=max_length)
        return self.out_proj(out.flatten(-2))

    def _some_of_packed(
        self, x: Tensor, offsets: Tensor, max_length: int, queries: slice
    ) -> Tensor:
        wanted = positions(x, offsets, queries)
        batch, count = wanted.shape[:2]
        own = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * count
        q, k, v = self._project_apart(wanted.flatten(0, 1), x)
        out: Any = varlen_attention(
            q,
            k,
            v,
            own,
            key_offsets=offsets,
            max_length=count,
            max_key_length=max_length,
        )
        return self.out_proj(out.flatten(-2)).view(wanted.shape)

    def _project(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        return qkv.unflatten(-1, (3, self.heads, -1))

    def _project_apart(self, queries: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Queries of some rows, keys and values of all."""
        width, bias = x.shape[-1], self.in_proj_bias
        q_bias, kv_bias = (None, None) if bias is None else bias.split((width, 2 * width))
        q_weight, kv_weight = self.in_proj_weight.split((width, 2 * width))
        q = linear(queries, q_weight, q_bias).unflatten(-1, (self.heads, -1))
        kv = linear(x, kv_weight, kv_bias)
        return q, *kv.unflatten(-1, (2, self.heads, -1)).unbind(-3)


def positions(x: Tensor, offsets: Tensor, wanted: slice) -> Tensor:
    """These positions of every sequence of packed rows ``x`` (T, C), none of which is shorter: (B, n, C)."""
    start, stop = wanted.start, wanted.stop
    if start is None or stop is None or not 0 <= start <= stop or wanted.step not in (None, 1):
        raise ValueError(
            f"queries: expected start <= stop, of step 1, with packed rows, got {wanted}"
        )
    within = torch.arange(start, stop, device=x.device)
    rows = offsets[:-1, None] + within
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
