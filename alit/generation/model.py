"""Transformer over packed token sequences: it predicts the next token (causal) or masked ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alit_kernels import pack, varlen_attention
from alit_kernels.nn import Linear

from .. import model_file
from ..layers import MLP, initialize
from .config import GeneratorConfig

FORMAT = "alit-generator-1"
#: Attention of a layer: (layer, queries, keys, values) -> outputs; all (T, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Packed(NamedTuple):
    """Packed rows of B sequences: each begins with its class, then come its tokens, masked ones last.

    Attributes:
        slot_T: (T,) int64 row of the embedding.
        position_T: (T,) int64: 0 of a class, n + 1 of token n, counted from 0 in each sequence.
        length_T: (T,) int64 tokens of the row's sequence.
        stop_T: (T,) int32: number of rows of its sequence that the row attends to, from the first on.
        masked_T: (T,) bool: True for masked tokens.
        offsets: (B + 1,) int32.
        longest: static bound for the rows of a sequence.
    """

    slot_T: Tensor
    position_T: Tensor
    length_T: Tensor
    stop_T: Tensor
    masked_T: Tensor
    offsets: Tensor
    longest: int


class Block(nn.Module):
    """Pre-norm transformer block over packed rows (T, C); the caller computes the attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x_TC: Tensor, layer: int, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x_TC)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x_TC = x_TC + self.out(attend(layer, q, k, v).flatten(-2))
        return x_TC + self.mlp(self.ln_2(x_TC))


class Generator(nn.Module):
    """Distribution over token sequences of any length up to ``config.max_tokens``.

    Row 0 of a sequence is its class, row r is token r - 1. A causal generator predicts token r, or the end, from rows 0
    to r. A masked generator knows the length and predicts masked tokens from all others, as MaskGIT does (Chang et al.,
    CVPR 2022, arXiv 2202.04200), except that no row attends to masked ones. Each codebook has its rows
    of the embedding, and one more: the end, or the mask. The same rows score predictions.

    Where tokens are masked, embeddings enter times the root of the width (Vaswani et al., NeurIPS 2017, arXiv
    1706.03762): at their small scale the mean of all rows, which attention adds to each, hides what a row is.

    Attributes:
        lengths: (classes or 1, max_tokens + 1) float32: how many images of the training data have each length.
    """

    lengths: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, kinds = config.width, max(1, len(config.classes))
        self.codes = config.codebooks * (config.codebook_size + 1)
        self.embedding = nn.Embedding(self.codes + kinds, width)
        self.position_embedding = nn.Embedding(config.max_tokens + 1, width)
        self.length_embedding = (
            None if config.causal else nn.Embedding(config.max_tokens + 1, width)
        )
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.ln = nn.LayerNorm(width)
        self.register_buffer("lengths", torch.zeros(kinds, config.max_tokens + 1))
        self.scale = 1.0 if config.causal else width**0.5
        initialize(self)
        nn.init.trunc_normal_(self.embedding.weight, std=0.02)
        for part in (self.position_embedding, self.length_embedding):
            if part is not None:
                nn.init.trunc_normal_(part.weight, std=0.02 * self.scale)

    def code_slot(self, token: Tensor, position: Tensor) -> Tensor:
        """Embedding rows of tokens at positions counted from the first token; token K is the end, or the mask."""
        config = self.config
        return position // config.codebook_span * (config.codebook_size + 1) + token

    def class_slot(self, label: Tensor) -> Tensor:
        """Embedding rows of classes; class 0 where there are none."""
        return self.codes + label

    def packed(self, label_B: Tensor, token_BN: Tensor, length_B: Tensor) -> Packed:
        """Packed rows of padded sequences (B, N), whatever the padding; token K is a masked one."""
        count, longest = token_BN.shape
        position_BN = torch.arange(longest, device=token_BN.device).expand(count, -1)
        inside = position_BN < length_B[:, None]
        token_BN = token_BN.where(inside, 0)
        masked_BN = token_BN == self.config.codebook_size
        if not self.config.causal:
            position_BN = (masked_BN + 2 * ~inside).argsort(dim=1, stable=True)
            token_BN, masked_BN = (x.gather(1, position_BN) for x in (token_BN, masked_BN))
        slot_BN = self.code_slot(token_BN, position_BN)
        class_B1 = self.class_slot(label_B)[:, None]
        known_B = 1 + length_B - masked_BN.sum(1)
        fields = (
            torch.cat([class_B1, slot_BN], 1),
            pad(position_BN + 1, (1, 0)),
            length_B[:, None].expand(-1, longest + 1),
            known_B[:, None].expand(-1, longest + 1),
            pad(masked_BN, (1, 0)),
        )
        capacity = int(length_B.sum()) + count
        rows, offsets = pack(torch.stack(fields, -1), length_B + 1, capacity=capacity)
        slot_T, position_T, length_T, stop_T, masked_T = rows.unbind(-1)
        stop_T = (position_T + 1 if self.config.causal else stop_T).int()
        return Packed(slot_T, position_T, length_T, stop_T, masked_T > 0, offsets, longest + 1)

    def forward(
        self, slot_T: Tensor, position_T: Tensor, length_T: Tensor | None, attend: Attend
    ) -> Tensor:
        """Features (T, C) of the rows, for :meth:`scored`; ``length_T`` is for a generator that is not causal."""
        x_TC = self.scale * self.embedding(slot_T) + self.position_embedding(position_T)
        if self.length_embedding is not None:
            x_TC = x_TC + self.length_embedding(length_T)
        for layer, block in enumerate(self.blocks):
            x_TC = block(x_TC, layer, attend)
        return self.ln(x_TC)

    def whole(self, rows: Packed) -> Tensor:
        """Features (T, C) of whole sequences, see :meth:`forward`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            limits: dict[str, Any] = {"max_length": rows.longest, "key_stop": rows.stop_T}
            out = varlen_attention(q, k, v, rows.offsets, **limits)
            assert isinstance(out, Tensor)
            return out

        return self(rows.slot_T, rows.position_T, rows.length_T, attend)

    def scored(self, x_TC: Tensor, position_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each codebook the rows that predict a token of it, (n,), and their logits (n, K + 1)."""
        config = self.config
        table_ICK = self.embedding.weight[: self.codes].unflatten(0, (config.codebooks, -1)).mT
        codebook_T = position_T // config.codebook_span
        for codebook in range(config.codebooks):
            rows = (codebook_T == codebook).nonzero()[:, 0]
            if len(rows):
                yield rows, x_TC[rows] @ table_ICK[codebook]

    def save_pretrained(self, path: str | Path) -> None:
        """Write one safetensors file, configuration in its metadata; raises as :func:`alit.model_file.write`."""
        write(path, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Generator:
        """Load a generator from a file of :meth:`save_pretrained`, on the CPU, in evaluation mode.

        Raises:
            alit.CheckpointError: a corrupt file, one of something else, or keys that do not fit (listed).
            OSError: no file, or one that cannot be read.
        """
        with model_file.opened(Path(path), FORMAT) as (file, described):
            with torch.device("meta"):
                generator = cls(GeneratorConfig.from_json(described))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            model_file.check_state(generator, state)  # before there is memory for it
        generator.to_empty(device="cpu")
        generator.load_state_dict(state)
        return generator.eval()


def write(path: str | Path, config: GeneratorConfig, state: Mapping[str, Tensor]) -> None:
    """Write a generator's file from configuration and state; raises as :meth:`Generator.save_pretrained`."""
    model_file.write_tensors(path, {"format": FORMAT, "config": config.to_json()}, state)
