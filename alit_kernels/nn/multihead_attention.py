"""``torch.nn.MultiheadAttention`` that computes by our kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._plain import is_plain
from ..sdpa import scaled_dot_product_attention, worth_reading
from .linear import linear


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: its constructor, its call, its parameters and state dict.

    Our kernels compute calls with ``need_weights=False``, batches of tokens (three dimensions) and no mask but a
    boolean ``key_padding_mask``; or ``is_causal`` with the ``attn_mask`` (N, M) that torch demands beside it, where
    torch goes by the hint and does not read that mask either: without ``key_padding_mask``, outside of its fast path
    (in training, with gradients, of cross-attention, without ``batch_first``, with an additive mask); or, on a CPU, an
    ``attn_mask`` (N, M) of a size that :func:`alit_kernels.scaled_dot_product_attention` reads. All other calls are the
    parent's: other ``attn_mask``, additive masks of keys, dropout in training, ``add_bias_kv``,
    ``add_zero_attn``, ``kdim`` and ``vdim``, tensors that are not dense. What attention itself does not take,
    :func:`alit_kernels.scaled_dot_product_attention` leaves to torch likewise.

    A query whose keys are all masked gives the output projection of zeros, also where torch's fast path gives NaN.
    ``nn.TransformerEncoderLayer`` calls no module in its fast path (evaluation without gradients), this one neither.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and attention weights as the parent returns them; the weights are None where our kernels compute."""
        if (
            need_weights
            or (self.dropout and self.training)
            or unfit(self)
            or not _fit(self, query, key, value, key_padding_mask)
            or (is_causal and not _by_hint(self, query, key, value, key_padding_mask, attn_mask))
            or not (
                is_causal
                or attn_mask is None
                or _read(self, query, key, key_padding_mask, attn_mask)
            )
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        q, k, v = self._project(query, key, value)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        if attn_mask is not None and not is_causal:
            mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2)
        out = (out if self.batch_first else out.transpose(0, 1)).flatten(-2)
        return linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values (.., .., heads, D), in as few products as there are different inputs."""
        width = self.embed_dim
        parts = [3] if query is key is value else [1, 2] if key is value else [1, 1, 1]
        sizes = [width * n for n in parts]
        weights = self.in_proj_weight.split(sizes)
        bias = self.in_proj_bias
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        found: list[Tensor] = []
        for x, n, w, b in zip((query, key, value), parts, weights, biases, strict=False):
            found += linear(x, w, b).unflatten(-1, (n, self.num_heads, self.head_dim)).unbind(-3)
        return found


def unfit(module: nn.MultiheadAttention) -> str:
    """Reason why all calls of a module go to its parent class; empty if they do not."""
    if not module._qkv_same_embed_dim:
        return "kdim or vdim"
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv"
    return "add_zero_attn" if module.add_zero_attn else ""


def _fit(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> bool:
    """True for dense batches that agree with each other and the weights; torch says what is wrong with others."""
    inputs = (query, key, value)
    tensors = (*inputs, module.in_proj_weight, module.out_proj.weight)
    if not is_plain(*tensors):
        return False
    if any(x.ndim != 3 or x.shape[-1] != module.embed_dim for x in inputs):
        return False
    batch = 0 if module.batch_first else 1
    if key.shape != value.shape or query.shape[batch] != key.shape[batch]:
        return False
    return mask is None or (
        is_plain(mask)
        and mask.dtype == torch.bool
        and mask.shape == (key.shape[batch], key.shape[1 - batch])
    )


def _read(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    mask: Tensor,
) -> bool:
    """True if our attention reads a mask of pairs; where the mask is not one of stops, it calls torch's attention."""
    tokens = 1 if module.batch_first else 0
    return (
        key_padding_mask is None
        and is_plain(mask)
        and mask.shape == (query.shape[tokens], key.shape[tokens])
        and worth_reading(mask, query.dtype)
    )


def _by_hint(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    mask: Tensor | None,
) -> bool:
    """True if torch goes by ``is_causal`` and leaves the mask unread, for tensors that :func:`_fit`."""
    batch = 0 if module.batch_first else 1
    if key_padding_mask is not None or mask is None or not is_plain(mask):
        return False
    if mask.shape != (query.shape[1 - batch], key.shape[1 - batch]):
        return False
    if mask.is_floating_point():
        return True
    if mask.dtype != torch.bool:  # torch raises
        return False
    if module.training or not module.batch_first or not query is key is value:
        return True
    # Other calls may take the fast path of torch, which reads masks.
    tensors = query, module.in_proj_weight, module.out_proj.weight
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
