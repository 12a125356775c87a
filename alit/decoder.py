"""The decoder: mask tokens attend to latent codes and become base tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alit_kernels import cumulative_offsets, pack
from alit_kernels.nn import Linear

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
            self.decoder_embed = Linear(code_dim, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(Linear(width, 2 * width), nn.Tanh(), Linear(2 * width, outputs))

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
        x, wanted = self._sequences(codes_BLC, query_QD), slice(1, query_QD.shape[0])
        if lengths_B is None:
            x = self(self.ln_pre(x), wanted=wanted)
        else:
            batch, longest = x.shape[:2]
            packed, offsets = pack(x, lengths_B + query_QD.shape[0], capacity=longest * batch)
            x = self(self.ln_pre(packed), offsets, max_length=longest, wanted=wanted)
        return self.ffn(self.ln_post(x))

    def decode_together(self, codes: Sequence[Tensor], query_QD: Tensor) -> Tensor:
        """Decode several batches of latents in one run, each batch of one length.

        Args:
            codes: (B, L, C), L of its own each.
            query_QD: as in :meth:`decode`.

        Returns:
            (sum of B, Q - 1, V)
        """
        if len({x.shape[1] for x in codes}) == 1:
            return self.decode(torch.cat(list(codes)), query_QD)
        sequences = [self._sequences(x, query_QD) for x in codes]
        lengths = [x.new_full(x.shape[:1], x.shape[1], dtype=torch.int64) for x in sequences]
        x = self(
            self.ln_pre(torch.cat([x.flatten(0, 1) for x in sequences])),
            cumulative_offsets(torch.cat(lengths)),
            max_length=max(x.shape[1] for x in sequences),
            wanted=slice(1, query_QD.shape[0]),
        )
        return self.ffn(self.ln_post(x))

    def _sequences(self, codes_BLC: Tensor, query_QD: Tensor) -> Tensor:
        """Queries, then the latents with their positions. (B, Q + L, D)"""
        latents = self.decoder_embed(codes_BLC) if hasattr(self, "decoder_embed") else codes_BLC
        latents = latents + self.latent_token_positional_embedding[: latents.shape[1]]
        queries = query_QD.expand(latents.shape[0], -1, -1).to(latents.dtype)
        return torch.cat([queries, latents], dim=1)
