"""Attention maps of latent tokens in the encoder, recomputed from its queries, keys and log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from alit_kernels import attention_map, cumulative_offsets, varlen_attention
from alit_kernels.nn import SelfAttention

from .layers import Block, finished
from .sizes import Places, check_size, grid_of
from .tokenizer import AdaptiveTokenizer


@torch.no_grad()
def latent_attention(
    model: AdaptiveTokenizer,
    images: Tensor,
    *,
    iteration: int | None = None,
    layer: int | None = None,
) -> Tensor:
    """Attention of every latent token to every image token in the encoder, mean over heads.

    No image leaves the batch: all run up to ``iteration``.

    Args:
        images: as for :meth:`AdaptiveTokenizer.rollout`, or of another size that the model takes.
        iteration: from 0; the last by default.
        layer: of the encoder, from 0; the mean over all by default.

    Returns:
        (B, L, height, width) float32 over the images' grid of image tokens, L latents in the order in which they were
        added. The rest of each latent's probability, up to 1, goes to the class token and to latents. With
        ``recurrence="residual"`` latents looked in the iteration that added them, at what was missing then.

    Raises:
        ValueError: an iteration or layer out of range; a model that drops image tokens (``halting="drop"``).
        TypeError, ValueError: images, as :meth:`AdaptiveTokenizer.rollout`.
    """
    _check_index("layer", 0 if layer is None else layer, model.config.encoder.layers)
    maps = attention_of_layers(model, images, iteration=iteration)
    return maps.mean(1) if layer is None else maps[:, layer]


@torch.no_grad()
def attention_of_layers(
    model: AdaptiveTokenizer, images: Tensor, *, iteration: int | None = None
) -> Tensor:
    """:func:`latent_attention` for each encoder layer, from one rollout: (B, layers, L, height, width) float32."""
    config = model.config
    iteration = config.iterations - 1 if iteration is None else iteration
    _check_index("iteration", iteration, config.iterations)
    if config.halting == "drop":
        raise ValueError("model: expected one that keeps all image tokens, got halting='drop'")
    places = _places(model, images)
    predict_at = () if config.halting == "off" else None
    rollout = model.rollout(images, predict_at=predict_at, places=places)
    maps = []
    for index in range(iteration + 1):
        # Final tokens leave the encoder with the iteration that added them.
        if index == iteration or config.recurrence == "residual":
            maps.append(_latents_of(model, rollout.tokens_BSD, places.tokens))
        if index < iteration:
            next(rollout)
    return torch.cat(maps, dim=2).unflatten(-1, places.grid)


def _places(model: AdaptiveTokenizer, images: Tensor) -> Places:
    """Positions of the images' grid; the model's own if ``images`` is no batch of images, which the rollout refuses."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        return model.places()
    height, width = images.shape[2:]
    check_size(model.config, height, width, "images")
    return model.places(grid_of(model.config, height, width))


def _check_index(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name}: expected one of 0..{count - 1}, got {value}")


def _latents_of(model: AdaptiveTokenizer, x_BSD: Tensor, tokens: int) -> Tensor:
    """Attention maps of the latents in an encoder input, behind N class and image ``tokens``: (B, layers, L, N - 1)."""
    maps = []
    for block in cast("Iterable[Block]", model.encoder.transformer):
        maps.append(_map(block.attn, block.ln_1(x_BSD), tokens))
        x_BSD = finished(*block(x_BSD))
    return torch.stack(maps, dim=1)


def _map(layer: SelfAttention, x_BSD: Tensor, tokens: int) -> Tensor:
    """Latents' rows and image tokens' columns of a layer's attention matrix, mean over heads: (B, L, N - 1)."""
    batch, length, _ = x_BSD.shape
    qkv = nn.functional.linear(x_BSD.flatten(0, 1), layer.in_proj_weight, layer.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, layer.heads, -1)).unbind(-3)
    offsets = cumulative_offsets(torch.full((batch,), length, device=x_BSD.device))
    _, lse = varlen_attention(q, k, v, offsets, max_length=length, return_lse=True)
    return attention_map(
        *(q, k, lse, offsets),
        queries=range(tokens, length),
        keys=range(1, tokens),
        max_length=length,
    )
