"""A start for training: weights with which a tokenizer is a local transform coder, crude but at every length.

From random weights a small tokenizer spends most of a short run finding out that a latent should look at some place and
say what is there. Here that is written into the weights, and everything else is left to training:

- Channels of the residual stream have roles: the base tokens' channels; positions; one that is 1 in the class tokens
  only; one that is 1 in image tokens and queries only.
- Two heads of encoder layer l send the latents of iteration l (and l plus the number of layers, ...) to a pair of
  neighbouring image tokens, one head to each, and copy channels: layer 0 those of most variance, layer 1 the next, ...
  Whoever has nothing to fetch in a layer attends to the class token, which holds nothing.
- The code is the fetched channels beside a constant, so that the unit sphere of a cosine codebook looks flat.
- The same heads of decoder layer l send the queries to the latents that describe them, and copy back.
- Other heads and the MLPs add nothing at first: their last layers are zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from alit_kernels.nn import SelfAttention

from ..base.interface import to_rows
from ..config import AdaptiveTokenizerConfig
from ..layers import Block
from ..tokenizer import AdaptiveTokenizer

#: Where a match, and the class token, stand in the softmax: logits of encoder and decoder layers, against about 0.
MATCH = {"encoder": 14.0, "decoder": 24.0}
SINK = {"encoder": 10.5, "decoder": 10.8}
#: Heads that fetch: one for each image token of a pair.
FETCHING = 2
#: Norm of the position in an image token after LayerNorm, which follows from the initial values.
POSITION_NORM = 8.0
#: In an image token beside its base channels: it is normalised, and so they nearly keep their magnitudes.
CONSTANT = 2.0
#: Deviation of the first channel that a latent fetched, and the constant beside it in the code.
FETCHED, CODE_CONSTANT = 3.5, 6.0
#: Gain of codes where they enter the decoder, and of what its queries fetch.
EMBEDDED = 1.5


@torch.no_grad()
def as_transform_coder(model: AdaptiveTokenizer, images: Tensor) -> None:
    """Give all but the base tokenizer the weights of a local transform coder.

    Args:
        model: with a continuous base tokenizer, a grid of even width, a latent for two image tokens, and heads that can
            hold half of the positions' channels: (width - base channels - 2) / 2 < width / heads.
        images: (B, 3, height, width) in [0, 1], from which the channels' variances and the codebook are taken.

    Raises:
        ValueError: a model of another shape.
    """
    _check(model.config)
    roles = _Roles(model, images)
    encoder_ND = _positions(model.encoder_positional_embedding, roles.place)
    decoder_ND = _positions(model.decoder_positional_embedding, roles.place)
    _make_tokens(model, roles)
    for layer in range(len(roles.groups)):
        _route(model, roles, layer, encoder_ND, decoder_ND)
    _read_and_write(model, roles)
    _start_codebook(model, images)


def _check(config: AdaptiveTokenizerConfig) -> None:
    height, across = config.grid
    channels, shape = config.base.latent_channels, config.encoder
    copied = _copied(config)
    room = shape.width // shape.heads
    for argument, fits, expected in (
        ("model", shape == config.decoder, "encoder and decoder of one shape"),
        ("base", config.base.kind != "vqgan", "a continuous base tokenizer"),
        ("bottleneck", config.bottleneck == "quantized", "a quantizer"),
        ("image_size", across % 2 == 0, "an even number of image tokens in a row"),
        (
            "latents_per_iteration",
            2 * config.latents_per_iteration == height * across,
            f"half as many as image tokens, {height * across // 2}",
        ),
        ("code_dim", copied >= 1, "at least 3"),
        ("heads", shape.heads >= FETCHING, f"at least {FETCHING}"),
        (
            "width",
            0 < (shape.width - channels - 2) // FETCHING < room,
            f"(width - {channels} - 2) / {FETCHING} channels for positions in a head of {room}",
        ),
        (
            "layers",
            (shape.layers + FETCHING) * copied <= channels,
            f"(layers + {FETCHING}) x {copied} base channels, of which there are {channels}",
        ),
    ):
        if not fits:
            raise ValueError(f"{argument}: a transform coder needs {expected}")


def _copied(config: AdaptiveTokenizerConfig) -> int:
    """Channels that a latent copies from each of its image tokens; the code's last one is a constant."""
    return (config.code_dim - 1) // FETCHING


class _Roles:
    """Channels of the residual stream.

    Attributes:
        groups: (layers, copied) base channels that a layer copies, by falling variance.
        carried: (2, copied) channels in which latents carry what each head fetched: those of least variance.
        place: of positions.
        is_class, is_token: 1 in class tokens, and in image tokens and queries.
        deviation, mean: (base channels,) of the base tokens.
        norm: root mean square of a base token's norm.
    """

    def __init__(self, model: AdaptiveTokenizer, images: Tensor) -> None:
        rows_TC = to_rows(model.base_tokenizer.encode(images).tokens_BCHW).flatten(0, 1)
        self.deviation, self.mean = rows_TC.std(0), rows_TC.mean(0)
        self.norm = rows_TC.square().sum(1).mean().sqrt().item()
        order = self.deviation.argsort(descending=True)
        copied, shape = _copied(model.config), model.config.encoder
        self.groups = order[: shape.layers * copied].view(shape.layers, copied)
        self.carried = order[-FETCHING * copied :].view(FETCHING, copied)
        self.place = slice(len(order), shape.width - 2)
        self.is_class, self.is_token = shape.width - 2, shape.width - 1

    def largest(self, layer: int) -> Tensor:
        """Deviation of the first channel that the layer copies."""
        return self.deviation[self.groups[layer]].max()


def _make_tokens(model: AdaptiveTokenizer, roles: _Roles) -> None:
    """Everything that enters encoder and decoder, but for positions."""
    for token in (model.encoder_class_embedding, model.decoder_class_embedding):
        token.zero_()[..., roles.is_class] = 1
    model.decoder_mask_token.zero_()[..., roles.is_token] = 1
    model.patch_embed.weight.mul_(0.05)
    model.patch_embed.get_parameter("bias").zero_()[-1] = CONSTANT
    for embedding in (
        model.latent_tokens,
        model.latent_token_positional_embedding,
        model.timestep_embedding,
        model.decoder.latent_token_positional_embedding,
    ):
        embedding.mul_(0.05)


def _route(
    model: AdaptiveTokenizer, roles: _Roles, layer: int, encoder_ND: Tensor, decoder_ND: Tensor
) -> None:
    """One layer of the encoder, then of the decoder, and the positions of the latents that use it."""
    config, place, group = model.config, roles.place, roles.groups[layer]
    count, layers = config.latents_per_iteration, config.encoder.layers
    scale = POSITION_NORM / math.hypot(CONSTANT, roles.norm)
    asking, answering = (
        _fetch(transformer.transformer[layer], roles, MATCH[name], SINK[name])
        for name, transformer in (("encoder", model.encoder), ("decoder", model.decoder))
    )
    for head, carried in enumerate(roles.carried):
        _copy(
            model.encoder.transformer[layer],
            head,
            group,
            carried,
            FETCHED / scale / roles.largest(layer),
        )
        _copy(model.decoder.transformer[layer], head, carried, group, EMBEDDED)
    latents = model.decoder.latent_token_positional_embedding
    for iteration in range(layer, config.iterations, layers):
        pair = _pairs(*config.grid, iteration // layers)
        own = slice(iteration * count, (iteration + 1) * count)
        # Positions from which a head attends to its image tokens, and to which theirs attend.
        queries, keys = asking
        model.timestep_embedding[iteration, :, place] += _turned(encoder_ND, pair, keys, queries)
        queries, keys = answering
        latents[own, place] += _turned(decoder_ND, pair, queries, keys)


def _fetch(block: nn.Module, roles: _Roles, match: float, sink: float) -> tuple[Tensor, Tensor]:
    """Let two heads of a layer attend by position, half of the position's channels in each, and the rest add nothing.

    A query q asks head h for position p where queries[h] q = keys[h] p, both (positions / 2, positions) with
    orthonormal rows, which are returned. The head's last row compares a constant query with the class token.
    """
    assert isinstance(block, Block)
    attention = block.attn
    nn.init.zeros_(block.mlp.c_proj.weight)
    nn.init.zeros_(attention.out_proj.weight)
    positions = roles.place.stop - roles.place.start
    rows = positions // FETCHING
    halves = (FETCHING, rows, positions)
    queries, keys = (_orthogonal(positions)[: FETCHING * rows].view(halves) for _ in range(2))
    weight, bias = (
        _by_head(attention, attention.in_proj_weight),
        _by_head(attention, attention.in_proj_bias),
    )
    root = math.sqrt(weight.shape[2])
    # Of norms 8 (keys) and 10 (queries), half of each squared within a head.
    gain = math.sqrt(match * root / (POSITION_NORM * 10 * 0.5))
    weight[:, :FETCHING] = 0
    weight[0, :FETCHING, :rows, roles.place] = gain * queries
    weight[1, :FETCHING, :rows, roles.place] = gain * keys
    weight[1, :FETCHING, rows, roles.is_class] = gain
    bias[0, :FETCHING, rows] = sink * root / (11 * gain)
    return queries, keys


def _by_head(attention: SelfAttention, projection: Tensor | None) -> Tensor:
    """A view of the input projection: (query key value, heads, channels of a head, ...)."""
    assert projection is not None
    return projection.unflatten(0, (3, attention.heads, -1))


def _copy(
    block: nn.Module, head: int, sources: Tensor, targets: Tensor, gain: float | Tensor
) -> None:
    """Of what the head attends to, these channels are added to others of the one that attends."""
    assert isinstance(block, Block)
    values = _by_head(block.attn, block.attn.in_proj_weight)[2, head]
    out = block.attn.out_proj.weight.unflatten(1, (block.attn.heads, -1))[:, head]
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        values[row, source] = gain
        out[target, row] = 1.0


def _read_and_write(model: AdaptiveTokenizer, roles: _Roles) -> None:
    """Latents to codes, codes to the decoder's latents, and its stream to base tokens."""
    read, decoder = model.pre_quantizer_mlp, model.decoder
    first, last = decoder.ffn.get_submodule("0"), decoder.ffn.get_submodule("2")
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    read.weight.mul_(0.1)
    decoder.decoder_embed.weight.mul_(0.05)
    for i, channel in enumerate(roles.carried.flatten().tolist()):
        read.weight[i, channel] += 1
        decoder.decoder_embed.weight[channel, i] += EMBEDDED
    read.bias.zero_()[-1] = CODE_CONSTANT
    last.bias.copy_(roles.mean)
    # Small enough for the tanh between them to be nearly linear; 0.6 is about what then arrives.
    for layer, group in enumerate(roles.groups.tolist()):
        for channel in group:
            first.weight[channel, channel] += 1 / 8
            last.weight[channel, channel] += roles.largest(layer) / 0.6


def _turned(positions_ND: Tensor, pair: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The positions of image tokens pair[h], as head h sees them from the other side, summed: (latents, positions)."""
    heads = zip(pair, source, target, strict=True)
    return torch.stack([positions_ND[p] @ a.T @ b for p, a, b in heads]).sum(0)


def _positions(embedding: nn.Parameter, place: slice) -> Tensor:
    """Unit vectors, orthogonal as far as there is room, in their channels; returned without the class token."""
    embedding.zero_()
    count, room = embedding.shape[0] - 1, place.stop - place.start
    vectors = torch.cat([_orthogonal(room) for _ in range(-(-count // room))])[:count]
    embedding[1:, place] = vectors
    return vectors


def _orthogonal(size: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(size, size))


def _pairs(height: int, across: int, turn: int) -> Tensor:
    """Image tokens in even columns, beside each its right or, in every other turn, left neighbour: (2, latents)."""
    grid = torch.arange(height * across).view(height, across)
    return torch.stack([grid.roll(-2 * (turn % 2), 1)[:, 0::2].flatten(), grid[:, 1::2].flatten()])


def _start_codebook(model: AdaptiveTokenizer, images: Tensor, samples: int = 32_768) -> None:
    """k-means of what the encoder gives for all lengths."""
    training = model.training
    model.eval()
    rollout = model.rollout(images, predict_at=[])
    vectors = torch.cat([x.bottleneck.continuous_BLC.flatten(0, 1) for x in rollout])
    model.train(training)
    model.quantize.initialize(vectors[torch.randperm(len(vectors))[:samples]], iterations=6)
    # Counts of a step, not of the sample.
    model.quantize.set_codebook(model.quantize.embedding.weight)
