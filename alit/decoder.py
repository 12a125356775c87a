"""The decoder: mask tokens attend to latent codes and become base tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alit_kernels import pack

from .config import TransformerConfig
from .layers import Transformer


class Decoder(Transformer):
    """[queries | latents] -> blocks -> the queries' positions -> base-token outputs.

    Args:
        config: width, layers, heads.
        max_tokens: longest sequence of latents.
        code_dim: channels of the latents that come in; None if they have the decoder's width already.
        outputs: base-token outputs per position (V).
    """

    def __init__(
        self, config: TransformerConfig, *, max_tokens: int, code_dim: int | None, outputs: int
    ) -> None:
        super().__init__(config)
        width = config.width
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(max_tokens, width))
        if code_dim is not None:
            self.decoder_embed = nn.Linear(code_dim, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, outputs)
        )

    def decode(
        self, codes_BLC: Tensor, query_QD: Tensor, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Decode latent codes.

        Args:
            codes_BLC: codes of the latents, padded to the longest.
            query_QD: class and mask tokens with their positions; the first row is the class token.
            lengths_B: latents per image where they differ: attention then stays
                within each image's own.

        Returns:
            (B, Q - 1, V)
        """
        latents = self.decoder_embed(codes_BLC) if hasattr(self, "decoder_embed") else codes_BLC
        latents = latents + self.latent_token_positional_embedding[: latents.shape[1]]
        x = torch.cat([query_QD.expand(latents.shape[0], -1, -1).to(latents.dtype), latents], dim=1)
        queries, longest = query_QD.shape[0], x.shape[1]
        if lengths_B is None:
            x = self(self.ln_pre(x), wanted=slice(1, queries))
        else:
            packed, offsets = pack(x, lengths_B + queries, capacity=longest * x.shape[0])
            packed = self(self.ln_pre(packed), offsets, max_length=longest)
            x = packed[offsets[:-1, None].long() + torch.arange(1, queries, device=x.device)]
        return self.ffn(self.ln_post(x))
