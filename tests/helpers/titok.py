"""A tokenizer with TiTok's architecture, made with torch's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .peers import TiTokQuantizer


class Block(nn.Module):
    """Pre-norm transformer block with torch's attention, sequence first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TiTok(nn.Module):
    """One-dimensional tokenizer: an encoder of patches and latents, a quantizer, a decoder of mask tokens and codes.

    The defaults are the sizes of TiTok-S-128: 8 + 8 blocks of width 512, 128 latents, 4096 codes of 12 channels.
    """

    def __init__(
        self,
        width: int = 512,
        layers: int = 8,
        heads: int = 8,
        latents: int = 128,
        patch: int = 16,
        grid: int = 16,
        num_codes: int = 4096,
        dim: int = 12,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        token = lambda n: nn.Parameter(torch.randn(n, 1, width) * width**-0.5)  # noqa: E731
        self.position, self.latents, self.mask = token(grid * grid), token(latents), token(1)
        self.encoder = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.decoder = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.into, self.out = nn.Linear(width, dim), nn.Linear(dim, width)
        self.quantize = TiTokQuantizer(num_codes, dim, cosine=True)
        self.pixels = nn.Linear(width, 3 * patch * patch)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = len(images)
        x = self.patch(images).flatten(2).permute(2, 0, 1) + self.position
        x = torch.cat([x, self.latents.expand(-1, batch, -1)])
        z = self.into(self.encoder(x)[-len(self.latents) :])
        quantized, results = self.quantize(z.permute(1, 2, 0)[:, :, None])
        codes = self.out(quantized[:, :, 0].permute(2, 0, 1))
        masks = (self.mask + self.position).expand(-1, batch, -1)
        return self.pixels(self.decoder(torch.cat([masks, codes]))[: len(masks)]), results
