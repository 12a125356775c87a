"""The decoder: mask tokens attend to latent codes and become base tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alit_kernels import compact, pack
from alit_kernels.nn import Linear
from alit_kernels.nn.self_attention import positions

from .config import TransformerConfig
from .layers import Transformer, one_behind_another


class Decoder(Transformer):
    """Transformer decoder: [queries | latents] -> blocks -> the queries' positions -> base-token outputs.

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
        """Decode the latent codes of one batch or several in one run.

        Args:
            codes: (B, L, C) of each batch, which may differ in L.
            query_QD: class and mask tokens with their positions; the first row is the class token.
            lengths_B: latents per image, of all batches, where they differ from L; attention then stays within each
                image's own.

        Returns:
            Base-token outputs (sum of B, Q - 1, V).
        """
        if len(codes) > 1 and len({x.shape[1] for x in codes}) == 1:
            codes = [torch.cat(list(codes))]
        sequences = [self._sequences(x, query_QD) for x in codes]
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

    def decode_each(
        self,
        codes: Sequence[Tensor],
        queries: Sequence[Tensor],
        lengths: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """:meth:`decode` batches with their own queries and lengths in one run: outputs (B, Q - 1, V) of each."""
        sequences = [self._sequences(x, query) for x, query in zip(codes, queries, strict=True)]
        x, offsets, longest = one_behind_another(sequences)
        if any(lengths_B is not None for lengths_B in lengths):
            keep = [
                _kept(x, query.shape[0], lengths_B)
                for x, query, lengths_B in zip(sequences, queries, lengths, strict=True)
            ]
            x, offsets, _ = compact(x, offsets, torch.cat(keep), capacity=x.shape[0])
        x = self(self.ln_pre(x), offsets, max_length=longest)
        ends = list(itertools.accumulate(len(batch) for batch in sequences))
        found = [
            positions(x, offsets[end - len(batch) : end + 1], slice(1, query.shape[0]))
            for batch, query, end in zip(sequences, queries, ends, strict=True)
        ]
        outputs = self.ffn(self.ln_post(torch.cat([part.flatten(0, 1) for part in found])))
        parts = outputs.split([part.shape[:2].numel() for part in found])
        return [y.unflatten(0, part.shape[:2]) for y, part in zip(parts, found, strict=True)]

    def _sequences(self, codes_BLC: Tensor, query_QD: Tensor) -> Tensor:
        """Decoder input (B, Q + L, D): queries, then latents with their positions."""
        embeds = hasattr(self, "decoder_embed")
        latents = self.decoder_embed(codes_BLC) if embeds else codes_BLC
        latents = latents + self.latent_token_positional_embedding[: codes_BLC.shape[1]]
        queries = query_QD.expand(codes_BLC.shape[0], -1, -1).to(latents.dtype)
        return torch.cat([queries, latents], dim=1)


def _kept(sequences: Tensor, queries: int, lengths_B: Tensor | None) -> Tensor:
    """Mask of the queries and of each sequence's own latents, (B S,) bool, for sequences (B, S, D)."""
    if lengths_B is None:
        return sequences.new_ones(sequences.shape[:2].numel(), dtype=torch.bool)
    place = torch.arange(sequences.shape[1], device=sequences.device)
    return (place < queries + lengths_B[:, None]).flatten()
