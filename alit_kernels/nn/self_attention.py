"""Multi-head self-attention and cross-attention over dense, padded or packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_count, check_number, check_tensor
from ..attention import attention, varlen_attention
from ..attention.op import self_attention
from ..ragged import pack, unpack
from .linear import Linear, linear

#: (queries, keys) -> both with their positions encoded.
Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SelfAttention(nn.Module):
    """Self-attention with the parameters of ``torch.nn.MultiheadAttention`` (same names, shapes and state dict).

    One product makes queries, keys and values; attention reads them in place. It has no dropout and no attention
    weights among its outputs.

    Dense input is (B, N, C), always: there is no ``batch_first``. torch's module takes (N, B, C) unless told otherwise,
    and no shape tells the two apart, so this one knows a single layout. Transpose a batch that lies the other way.

    Args:
        width: channels C.
        heads: number of heads H; must divide ``width``. D is ``width / heads``.
        bias: whether both projections have biases.
        qkv_bias: whether the input projection has them; "qv": queries and values alone, parameters ``q_bias`` and
            ``v_bias`` (BEiT, EVA). ``bias`` by default.
        out_bias: whether the output projection has one; ``bias`` by default.
        qk_norm: makes a module of D channels, ``nn.RMSNorm`` or ``nn.LayerNorm``, say: ``q_norm`` and ``k_norm``, for
            queries and keys of every head. None: there are none.
        scale: factor on the scores; 1/sqrt(D) by default.
        context_width: channels of ``context``, where they are others than C. Then the module is one of cross-attention
            alone, with the parameters of torch's that has this ``kdim`` and ``vdim``.

    Raises:
        TypeError, ValueError: ``heads`` does not divide ``width``; another ``qkv_bias``; a ``scale`` that is no finite
            number.
    """

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    q_bias: Tensor
    v_bias: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        qkv_bias: bool | str | None = None,
        out_bias: bool | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width)
        check_count("heads", heads, minimum=1)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        qkv_bias = bias if qkv_bias is None else qkv_bias
        if qk_norm is not None and not callable(qk_norm):
            raise TypeError(
                f"qk_norm: expected None or a callable such as nn.RMSNorm, got {type(qk_norm).__name__}"
            )
        if qkv_bias not in (True, False, "qv"):
            raise ValueError(f"qkv_bias: expected True, False or 'qv', got {qkv_bias!r}")
        self.heads, self.qkv_bias, self.context_width = heads, qkv_bias, context_width
        self._scale = None if scale is None else check_number("scale", scale)
        self._normalized = qk_norm is not None
        shapes: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * width, width)}
        if context_width is not None:
            check_count("context_width", context_width, minimum=1)
        self._apart = context_width not in (None, width)
        if context_width is not None and self._apart:
            of_context = (width, context_width)
            shapes = {"q_proj_weight": (width, width)}
            shapes |= {"k_proj_weight": of_context, "v_proj_weight": of_context}
        if qkv_bias == "qv":
            shapes |= {"q_bias": (width,), "v_bias": (width,)}
        elif qkv_bias:
            shapes["in_proj_bias"] = (3 * width,)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if "in_proj_bias" not in shapes:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = Linear(width, width, bias=bias if out_bias is None else out_bias)
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(width // heads), qk_norm(width // heads)
        #: True if it computes what torch's module does, by one product. Settled here, so that a call need not ask.
        self.plain = qk_norm is scale is context_width is None and qkv_bias != "qv"
        self.reset_parameters()

    @property
    def scale(self) -> float | None:
        """Factor on the scores as it was given; None for 1/sqrt(D)."""
        return self._scale

    def reset_parameters(self) -> None:
        """The initialization of ``torch.nn.MultiheadAttention``: Xavier uniform input projections, zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("proj_weight"):
                nn.init.xavier_uniform_(parameter)
            elif name in ("in_proj_bias", "q_bias", "v_bias", "out_proj.bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        *,
        offsets: Tensor | None = None,
        max_length: int | None = None,
        lengths: Tensor | None = None,
        queries: slice | None = None,
        key_mask: Tensor | None = None,
        key_stop: Tensor | None = None,
        rope: Rope | None = None,
        context: Tensor | None = None,
        context_offsets: Tensor | None = None,
        max_context_length: int | None = None,
    ) -> Tensor:
        """Attend within each sequence, or to a context.

        Args:
            x: (B, N, C), or packed rows (T, C) with ``offsets``.
            offsets: (B + 1,) int32, see :func:`alit_kernels.varlen_attention`.
            max_length: static bound for the longest packed sequence; T by default.
            lengths: (B,) tokens of each sequence of a padded dense ``x``. The rows beyond are not read and are zero in
                the result; attention computes none of them.
            queries: positions of each sequence whose result is wanted, the others being keys and values alone; all by
                default. With packed rows a slice of start and stop, and no sequence may end before its stop.
            key_mask: (B, M) bool, or (T',) of packed keys; True where a key takes part.
            key_stop: (N,) or (B, N) int32, or (T,) of packed rows: each query sees the keys before its stop, as in
                :func:`alit_kernels.attention`. With ``queries`` of those that are wanted, all (B n,) behind each other
                of packed rows.
            rope: gets queries and keys behind ``qk_norm`` and returns them, in their dtypes, as attention is to have
                them. They are (B, N, H, D) and (B, M, H, D), of packed rows (T, H, D) and (T', H, D); with ``queries``
                the first are those that are wanted, of packed rows (B n, H, D).
            context: (B, M, C) or (B, M, ``context_width``), what keys and values are made of; ``x`` by default. Packed
                rows (T', ...) with ``context_offsets`` where ``x`` is packed.
            context_offsets: (B + 1,) int32, the sequences of a packed context.
            max_context_length: static bound for the longest of these; T' by default.

        Returns:
            The shape of ``x``; with ``queries`` of these positions alone, (B, n, C) for packed sequences too.

        Raises:
            ValueError: ``lengths`` with ``offsets`` or with anything behind it in this list, ``queries`` with
                ``context``; a slice without its ends; a context that is missing, or not packed as ``x`` is.
        """
        usual = (
            key_mask is key_stop is rope is context is context_offsets is max_context_length is None
        )
        if lengths is not None:
            if not (usual and offsets is queries is None):
                raise ValueError(
                    "lengths: expected None with offsets, queries, key_mask, key_stop, rope or context, got a tensor"
                )
            if not self.plain:
                self._check(x, None, None, None, None, None)
            batch, length = x.shape[:2]
            rows, offsets = pack(x, lengths, capacity=batch * length)
            return unpack(self._packed(rows, offsets, length), offsets, max_length=length)
        if usual and queries is None and self.plain:
            if offsets is not None:
                return self._packed(x, offsets, x.shape[0] if max_length is None else max_length)
            return self.out_proj(self_attention(self._project(x)).flatten(-2))
        if not (usual and self.plain):
            self._check(x, queries, offsets, context, context_offsets, max_context_length)
        options: Any = {"key_mask": key_mask, "key_stop": key_stop, "scale": self._scale}
        if offsets is None:
            rows = x if queries is None else x[:, queries]
            out: Any = attention(*self._heads(rows, x, context, rope), **options)
            return self.out_proj(out.flatten(-2))
        rows, own, longest = x, offsets, x.shape[0] if max_length is None else max_length
        longest_key = longest
        if queries is not None:
            rows = positions(x, offsets, queries)
            batch, longest = rows.shape[:2]
            own = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * longest
        if context is not None:
            offsets = context_offsets
            longest_key = context.shape[0] if max_context_length is None else max_context_length
        out = varlen_attention(
            *self._heads(rows if queries is None else rows.flatten(0, 1), x, context, rope),
            own,
            key_offsets=None if own is offsets else offsets,
            max_length=longest,
            max_key_length=longest_key,
            **options,
        )
        return self.out_proj(out.flatten(-2)).view(rows.shape)

    def _packed(self, x: Tensor, offsets: Tensor, max_length: int) -> Tensor:
        """Self-attention of packed rows."""
        if self.plain:
            out: Any = self_attention(self._project(x), offsets, max_length=max_length)
        else:
            q, k, v = self._heads(x, x, None, None)
            out = varlen_attention(q, k, v, offsets, max_length=max_length, scale=self._scale)
        return self.out_proj(out.flatten(-2))

    def _heads(
        self, rows: Tensor, x: Tensor, context: Tensor | None, rope: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``rows``, keys and values of ``context``, which is ``x`` where there is none: (..., H, D)."""
        if rows is x and context is None:
            q, k, v = self._project(x).unbind(-3)
        else:
            q, k, v = self._project_apart(rows, x if context is None else context)
        if self._normalized:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q, k)
        return q, k, v

    def _project(self, x: Tensor) -> Tensor:
        bias = self._qv_bias() if self.qkv_bias == "qv" else self.in_proj_bias
        qkv = linear(x, self.in_proj_weight, bias)
        return qkv.unflatten(-1, (3, self.heads, -1))

    def _project_apart(self, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the rows ``queries``, keys and values of ``context``: (..., H, D) each."""
        width = queries.shape[-1]
        bias = self._qv_bias() if self.qkv_bias == "qv" else self.in_proj_bias
        if self._apart:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if bias is None else bias.split(width)
            rows = queries, context, context
            products = map(linear, rows, weights, biases)
            q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in products)
            return q, k, v
        q_bias, kv_bias = (None, None) if bias is None else bias.split((width, 2 * width))
        q_weight, kv_weight = self.in_proj_weight.split((width, 2 * width))
        q = linear(queries, q_weight, q_bias).unflatten(-1, (self.heads, -1))
        kv = linear(context, kv_weight, kv_bias)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return q, k, v

    def _qv_bias(self) -> Tensor:
        """Bias (3 C,) of queries, keys and values: zeros for keys."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def _check(
        self,
        x: Tensor,
        queries: slice | None,
        offsets: Tensor | None,
        context: Tensor | None,
        context_offsets: Tensor | None,
        max_context_length: int | None,
    ) -> None:
        if context is None and self.context_width is not None:
            raise ValueError(
                f"context: expected one of {self.context_width} channels (context_width), got None"
            )
        if context is not None:
            channels = self.context_width or self.out_proj.in_features
            packed = offsets is not None
            check_tensor(
                "context", context, shape=(*(() if packed else (x.shape[0],)), None, channels)
            )
        if context is not None and queries is not None:
            raise ValueError("queries: expected None with context, got a slice")
        if context is not None and offsets is not None and context_offsets is None:
            raise ValueError("context_offsets: expected a tensor with packed rows, got None")
        if context is None or offsets is None:
            for name, value in (
                ("context_offsets", context_offsets),
                ("max_context_length", max_context_length),
            ):
                if value is not None:
                    raise ValueError(
                        f"{name}: expected None without a packed context, got {type(value).__name__}"
                    )


def positions(x: Tensor, offsets: Tensor, wanted: slice) -> Tensor:
    """Rows (B, n, C) at the positions ``wanted`` of every sequence of packed rows ``x`` (T, C), none being shorter."""
    start, stop = wanted.start, wanted.stop
    if start is None or stop is None or not 0 <= start <= stop or wanted.step not in (None, 1):
        raise ValueError(
            f"queries: expected start <= stop, of step 1, with packed rows, got {wanted}"
        )
    within = torch.arange(start, stop, device=x.device)
    rows = offsets[:-1, None] + within
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
