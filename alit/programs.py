"""Encoder and decoder as programs of ``torch.export``: torch's own operators alone, for any number of images.

Our ops are decomposed into these; the model stays as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import embedding, normalize

from .criteria import FixedLength
from .sequence import TokenSequence
from .tokenizer import AdaptiveTokenizer

#: Numbers of images that programs are made with, and tried on.
BATCHES = 1, 3


class Encoder(nn.Module):
    """Module from images (B, 3, height, width) float32 in [0, 1] to indices (B, length) int64 of their first tokens."""

    def __init__(self, model: AdaptiveTokenizer, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length

    def forward(self, images: Tensor) -> Tensor:
        steps = -(-self.length // self.model.config.latents_per_iteration)
        *_, last = self.model.rollout(images, predict_at=(), iterations=steps)
        assert last.bottleneck.index_BL is not None
        return last.bottleneck.index_BL[:, : self.length]


class Decoder(nn.Module):
    """Module from indices (B, length) int64 to images (B, 3, height, width) float32, about [0, 1], not clamped."""

    def __init__(self, model: AdaptiveTokenizer) -> None:
        super().__init__()
        config, every = model.config, torch.arange(model.config.codebook_size)
        each, quantizers = config.codebooks == "each", cast(Any, model.quantize)
        codes = [one.codes(every) for one in quantizers] if each else [model.codes(every)]
        iteration = torch.arange(config.max_tokens) // config.latents_per_iteration
        self.model = model
        #: Codes of all codebooks, and the row at which the codebook of each token begins.
        self.codes: Tensor
        self.begins: Tensor
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("begins", iteration * (config.codebook_size if each else 0))

    def forward(self, indices: Tensor) -> Tensor:
        codes_BLC = embedding(indices + self.begins[: indices.shape[1]], self.codes)
        return self.model.pixels(self.model.predict(codes_BLC))


class Part(NamedTuple):
    """Module of which a program is made, and inputs to test it on.

    Attributes:
        takes, gives: names of its input and output.
        varies: dynamic dimensions of its input.
        pairs: inputs to test it on, and what the model's own methods return for them.
    """

    name: str
    module: nn.Module
    takes: str
    gives: str
    varies: dict[int, Any]
    pairs: list[tuple[Tensor, Tensor]]


def encoder(model: AdaptiveTokenizer, length: int) -> Part:
    """Encoder of images of the configured size into their first ``length`` tokens."""
    pairs = []
    for count in BATCHES:
        random = torch.Generator().manual_seed(count)
        images = torch.rand(count, 3, *model.config.image_size, generator=random)
        indices = model.encode(images, FixedLength(length)).indices
        assert indices is not None
        pairs.append((images, indices.view(count, length)))
    module = Encoder(model, length)
    return Part(f"encoder-{length}", module, "images", "indices", {0: Dim("batch")}, pairs)


def decoder(model: AdaptiveTokenizer) -> Part:
    """Decoder of any number of tokens that is a multiple of :func:`step_of`; a program does not check that."""
    config, step, pairs = model.config, step_of(model), []
    for count, length in zip(BATCHES, (step, config.max_tokens), strict=True):
        random = torch.Generator().manual_seed(count)
        indices = torch.randint(config.codebook_size, (count, length), generator=random)
        images = model.decode(TokenSequence(torch.full((count,), length), indices.flatten()))
        assert isinstance(images, Tensor)
        pairs.append((indices, images))
    varies = {0: Dim("batch")}
    if config.max_tokens > 1:
        varies[1] = Dim("length", max=config.max_tokens)
    return Part("decoder", Decoder(model), "indices", "images", varies, pairs)


def step_of(model: AdaptiveTokenizer) -> int:
    """Number that lengths are multiples of: 1, or, if the decoder was not trained for that, an iteration's tokens."""
    return 1 if model.config.any_length else model.config.latents_per_iteration


def exported(part: Part) -> ExportedProgram:
    """Program of a part, exported and decomposed to torch's own operators."""
    example = part.pairs[-1][0]
    program = torch.export.export(part.module, (example,), dynamic_shapes=(part.varies,))
    ours = torch.ops.alit_kernels
    plain = {
        ours.attention.default: _attention,
        ours.nearest_codeword.default: _nearest_codeword,
        ours.soft_codebook.default: _soft_codebook,
        ours.vector_quantize.default: _vector_quantize,
    }
    return program.run_decompositions({**torch.export.default_decompositions(), **plain})


# Decompositions of our operators in a program. Not their references: those fill memory in place, or loop over blocks of
# rows, whose number would be that of the example. Results that no program uses are empty.


def _attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Attention of dense batches without masks, the only ones in a program; the log-sum-exp is empty.

    q, k and v are transposed one by one, as in most models: when inductor looks for attention to fuse, it takes any
    permutation of keys for this one, and fails on another if the length is dynamic.
    """
    *others, scale, _ = options
    assert others[0] is others[1] is others[4] is others[5] is None
    if k is None or v is None:
        q, k, v = q.unbind(-3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = (q @ k.transpose(2, 3) * scale).softmax(-1)
    return (p @ v).transpose(1, 2).contiguous(), q.new_empty(0)


def _nearest_codeword(z: Tensor, codebook: Tensor, metric: str, *_: Any) -> Tensor:
    """Index of the codeword nearest to each row, in float64, where one product is as exact as differences."""
    if metric == "cosine":
        z, codebook = normalize(z, dim=-1), normalize(codebook, dim=-1)
    z, codebook = z.double(), codebook.double()
    return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)


def _vector_quantize(
    z: Tensor, codebook: Tensor, mask: None, metric: str, *_: Any
) -> tuple[Tensor, ...]:
    index = _nearest_codeword(z.flatten(0, -2), codebook, metric).view(z.shape[:-1])
    codes = normalize(codebook, dim=-1) if metric == "cosine" else codebook
    return codes[index], index, *[z.new_empty(0)] * 3


def _soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None, _: str
) -> tuple[Tensor, ...]:
    p = logits.softmax(-1)
    p_target = p.new_empty(0) if target is None else p.gather(1, target[:, None])[:, 0]
    return p @ codebook, -p_target.log(), p_target, p.new_empty(0)
