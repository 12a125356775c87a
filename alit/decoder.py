"""The decoder: mask tokens attend to latent codes and become base tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alit_kernels import pack
from alit_kernels.nn import Linear

from .config import TransformerConfig
from .layers import Transformer, one_behind_another


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
        self, codes: Sequence[Tensor], query_QD: Tensor, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Decode latent codes, in one run.

        Args:
            codes: (B, L, C), one batch or several, L of its own each.
            query_QD: class and mask tokens with their positions; the first row is the class token.
            lengths_B: latents per image, of all batches, where they differ from L; attention then stays within each
                image's own.

        Returns:
            (sum of B, Q - 1, V)
        """
        if len(codes) > 1 and len({x.shape[1] for x in codes}) == 1:
            codes = [torch.cat(list(codes))]
        sequences = []
        for x in codes:
            latents = self.decoder_embed(x) if hasattr(self, "decoder_embed") else x
            latents = latents + self.latent_token_positional_embedding[: x.shape[1]]
            queries = query_QD.expand(x.shape[0], -1, -1).to(latents.dtype)
            sequences.append(torch.cat([queries, latents], dim=1))
        x, offsets, longest = sequences[0], None, max(x.shape[1] for x in sequences)
        if lengths_B is not None:
            capacity = sum(x.shape[0] * x.shape[1] for x in sequences)
            padded = [pad(x, (0, 0, 0, longest - x.shape[1])) for x in sequences]
            x = padded[0] if len(padded) == 1 else torch.cat(padded)
            x, offsets = pack(x, lengths_B + query_QD.shape[0], capacity=capacity)
        elif len(sequences) > 1:
            x, offsets, longest = one_behind_another(sequences)
        wanted = slice(1, query_QD.shape[0])
        x = self(self.ln_pre(x), offsets, max_length=longest, wanted=wanted)
        return self.ffn(self.ln_post(x))
