"""Reimplementation of the interface of vector-quantize-pytorch's VectorQuantize and its codebook."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from .renamed import known_as, squared_distances, through


def identity(x: Tensor) -> Tensor:
    return x


def unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1, eps=1e-6)


@known_as("Codebook", "vector_quantize_pytorch.vector_quantize_pytorch")
class LucidrainsCodebook(nn.Module):
    """Codebook updated by moving averages of decay 0.8, or learned by gradient."""

    def __init__(self, num_codes: int, dim: int, cosine: bool, learned: bool, dead: int) -> None:
        super().__init__()
        embed = torch.randn(1, num_codes, dim)
        embed = unit(embed) if cosine else embed
        self.decay, self.use_cosine_sim, self.learnable_codebook = 0.8, cosine, learned
        self.transform_input = unit if cosine else identity
        self.ema_update, self.manual_ema_update = not learned, False
        self.codebook_size, self.num_codebooks, self.use_ddp = num_codes, 1, False
        self.affine_param, self.vq_bridge, self.gumbel_sample = False, None, None
        self.threshold, self.has_dead_code_replacement = dead, dead > 0
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("cluster_size", torch.ones(1, num_codes))
        self.register_buffer("embed_avg", embed.clone())
        if learned:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def update_ema(self) -> None:
        size = self.cluster_size.sum()
        smoothed = (self.cluster_size + 1e-5) / (size + 1e-5 * self.codebook_size) * size
        embed = self.embed_avg / smoothed[..., None]
        self.embed.data.copy_(unit(embed) if self.use_cosine_sim else embed)

    def expire_codes_(self, rows: Tensor, seq_mask: Tensor | None = None) -> None:
        dead = self.cluster_size[0] < self.threshold
        if self.training and dead.any():
            rows = rows[0] if seq_mask is None else rows[0][seq_mask[0]]
            chosen = torch.randint(len(rows), (int(dead.sum()),))
            self.embed.data[0, dead] = self.embed_avg.data[0, dead] = rows[chosen]
            self.cluster_size.data[0, dead] = self.threshold

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: Any = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: Any = False,
        ema_update: Any = None,
        topk: Any = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, codes = x.float(), self.embed[0] if self.learnable_codebook else self.embed[0].detach()
        rows = x.flatten(0, -2)
        distances = rows @ codes.t()
        if not self.use_cosine_sim:
            distances = -squared_distances(rows, codes).clamp(min=1e-8).sqrt()
        index = distances.argmax(1)
        quantized = codes[index].view(x.shape)
        updates = self.ema_update or self.has_dead_code_replacement
        if self.training and not freeze_codebook and updates:
            one_hot = nn.functional.one_hot(index, self.codebook_size).float()
            if mask is not None:
                heads = len(rows) // mask.numel()
                mask = mask.repeat_interleave(heads, 0).view(1, -1)
                one_hot = one_hot * mask.view(-1, 1)
            self.cluster_size.data.lerp_(one_hot.sum(0)[None], 1 - self.decay)
            total = (one_hot.t() @ rows.detach()).float()
            self.embed_avg.data.lerp_(total[None], 1 - self.decay)
            if self.ema_update:
                self.update_ema()
            if self.has_dead_code_replacement:
                self.expire_codes_(rows.detach()[None], mask)
        return quantized, index.view(x.shape[:-1]), distances.view(*x.shape[:-1], -1)


def turned(x: Tensor, quantized: Tensor) -> Tensor:
    """Rotation trick with an explicit rotation matrix for each vector."""
    fixed, q = x.detach(), quantized.detach()
    e, t, eye = unit(fixed), unit(q), torch.eye(x.shape[-1])
    r = unit(e + t)
    outer = lambda a, b: a[..., :, None] * b[..., None, :]  # noqa: E731
    rotation = eye - 2 * outer(r, r) + 2 * outer(t, e)
    scale = q.norm(dim=-1, keepdim=True) / fixed.norm(dim=-1, keepdim=True)
    return scale * (rotation @ x[..., None])[..., 0]


@known_as("VectorQuantize", "vector_quantize_pytorch.vector_quantize_pytorch")
class Lucidrains(nn.Module):
    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        width: int | None = None,
        heads: int = 1,
        cosine: bool = False,
        learned: bool = False,
        image: bool = False,
        dead: int = 0,
        diversity: bool = False,
        rotation: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.use_cosine_sim = width or dim * heads, heads, cosine
        self.has_projections = self.dim != dim * heads
        into = (nn.Linear(self.dim, dim * heads), nn.Linear(dim * heads, self.dim))
        self.project_in, self.project_out = (
            into if self.has_projections else (nn.Identity(), nn.Identity())
        )
        self._codebook = LucidrainsCodebook(num_codes, dim, cosine, learned, dead)
        self.in_place_codebook_optimizer, self.commitment_use_cross_entropy_loss = None, False
        self.has_codebook_diversity_loss, self.rotation = diversity, rotation
        self.accept_image_fmap, self.accept_3d_fmap, self.channel_last = image, False, True

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        topk: int | None = None,
        accum_ema_update: bool = False,
    ) -> tuple[Tensor, ...]:
        shape = x.shape
        x = x.flatten(2).transpose(1, 2) if self.accept_image_fmap else x
        x = self.project_in(x)
        batch, tokens, _ = x.shape
        if self.heads > 1:
            x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)[None]
        x = self._codebook.transform_input(x)
        quantized, index, distances = self._codebook(
            x,
            mask=mask,
            freeze_codebook=freeze_codebook,
            topk=topk,
            accum_ema_update=accum_ema_update,
        )
        if indices is not None:
            return quantized, nn.functional.cross_entropy(distances.flatten(0, -2), indices)
        target = quantized if self._codebook.learnable_codebook else quantized.detach()
        loss = mse_loss(target, x) if mask is None else mse_loss(target[mask], x[mask])
        if self.training:
            quantized = (turned if self.rotation else through)(x, quantized)
        if self.heads > 1:
            quantized = quantized.view(batch, self.heads, tokens, -1).transpose(1, 2).flatten(-2)
            index = index.view(batch, self.heads, tokens).transpose(1, 2)
        quantized = self.project_out(quantized)
        if self.accept_image_fmap:
            quantized = quantized.transpose(1, 2).unflatten(-1, shape[2:])
            index = index.unflatten(-1, shape[2:])
        return quantized, index, loss


class LucidrainsResidual(nn.Module):
    """Residual quantizer like the package's ResidualVQ: each level quantizes the residual of those before."""

    def __init__(self, num_levels: int, num_codes: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Lucidrains(num_codes, dim) for _ in range(num_levels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found, residual = [], x
        for layer in self.layers:
            found.append(layer(residual))
            residual = residual - found[-1][0].detach()
        quantized, index, losses = zip(*found, strict=True)
        return sum(quantized), torch.stack(index, -1), torch.stack(losses)
