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
from dataclasses import dataclass

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
    roles = _roles(model, images)
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


@dataclass(frozen=True)
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

    groups: Tensor
    carried: Tensor
    place: slice
    is_class: int
    is_token: int
    deviation: Tensor
    mean: Tensor
    norm: float

    def largest(self, layer: int) -> Tensor:
        """Deviation of the first channel that the layer copies."""
        return self.deviation[self.groups[layer]].max()


def _roles(model: AdaptiveTokenizer, images: Tensor) -> _Roles:
    rows_TC = to_rows(model.base_tokenizer.encode(images).tokens_BCHW).flatten(0, 1)
    deviation = rows_TC.std(0)
    order = deviation.argsort(descending=True)
    copied, layers = _copied(model.config), model.config.encoder.layers
    width = model.config.encoder.width
    return _Roles(
        groups=order[: layers * copied].view(layers, copied),
        carried=order[-FETCHING * copied :].view(FETCHING, copied),
        place=slice(len(order), width - 2),
        is_class=width - 2,
        is_token=width - 1,
        deviation=deviation,
        mean=rows_TC.mean(0),
        norm=rows_TC.square().sum(1).mean().sqrt().item(),
    )


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
    config, positions = model.config, roles.place.stop - roles.place.start
    count = config.latents_per_iteration
    scale = POSITION_NORM / math.hypot(CONSTANT, roles.norm)
    latents = model.decoder.latent_token_positional_embedding
    for name, transformer in (("encoder", model.encoder), ("decoder", model.decoder)):
        block = transformer.transformer[layer]
        assert isinstance(block, Block)
        nn.init.zeros_(block.mlp.c_proj.weight)
        nn.init.zeros_(block.attn.out_proj.weight)
        queries, keys = _orthogonal(positions), _orthogonal(positions)
        fetch = _Fetch(block.attn, queries, keys, roles, MATCH[name], SINK[name])
        for head in range(FETCHING):
            fetch.route(head)
            pairs = zip(roles.groups[layer].tolist(), roles.carried[head].tolist(), strict=True)
            for i, (channel, carrier) in enumerate(pairs):
                if name == "encoder":
                    fetch.copy(head, i, channel, carrier, FETCHED / scale / roles.largest(layer))
                else:
                    fetch.copy(head, i, carrier, channel, EMBEDDED)
        for iteration in range(layer, config.iterations, config.encoder.layers):
            pair = _pairs(*config.grid, iteration // config.encoder.layers)
            if name == "encoder":
                model.timestep_embedding[iteration, :, roles.place] += fetch.asking(
                    encoder_ND, pair
                )
            else:
                own = slice(iteration * count, (iteration + 1) * count)
                latents[own, roles.place] += fetch.answering(decoder_ND, pair)


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


class _Fetch:
    """Two heads of one layer that attend by position: half of the position's channels in each.

    A query q asks head h for position p where queries[h] q = keys[h] p, both (positions / 2, positions) with
    orthonormal rows. The head's last row compares a constant query with the class token.
    """

    def __init__(
        self,
        attention: SelfAttention,
        queries: Tensor,
        keys: Tensor,
        roles: _Roles,
        match: float,
        sink: float,
    ) -> None:
        self.attention, self.roles, self.sink = attention, roles, sink
        self.rows = queries.shape[0] // FETCHING
        self.queries = queries.split(self.rows)[:FETCHING]
        self.keys = keys.split(self.rows)[:FETCHING]
        self.width = attention.out_proj.in_features
        self.head_dim = self.width // attention.heads
        # Of norms 8 (keys) and 10 (queries), half of each squared within a head.
        self.gain = math.sqrt(match * math.sqrt(self.head_dim) / (POSITION_NORM * 10 * 0.5))

    def route(self, head: int) -> None:
        start, width, rows = head * self.head_dim, self.width, self.rows
        place = self.roles.place
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        assert bias is not None
        for part in range(3):
            weight[part * width + start : part * width + start + self.head_dim] = 0
        weight[start : start + rows, place] = self.gain * self.queries[head]
        weight[width + start : width + start + rows, place] = self.gain * self.keys[head]
        weight[width + start + rows, self.roles.is_class] = self.gain
        bias[start + rows] = self.sink * math.sqrt(self.head_dim) / (11 * self.gain)

    def copy(self, head: int, i: int, source: int, target: int, gain: float | Tensor) -> None:
        """Of what the head attends to, channel ``source`` is added to channel ``target`` of the one that attends."""
        row = head * self.head_dim + i
        self.attention.in_proj_weight[2 * self.width + row, source] = gain
        self.attention.out_proj.weight[target, row] = 1.0

    def asking(self, positions_ND: Tensor, pair: Tensor) -> Tensor:
        """Positions from which head h attends to image token pair[h]: (latents, positions)."""
        heads = zip(pair, self.queries, self.keys, strict=True)
        return torch.stack([positions_ND[p] @ k.T @ q for p, q, k in heads]).sum(0)

    def answering(self, positions_ND: Tensor, pair: Tensor) -> Tensor:
        """Positions that image token pair[h] attends to with head h: (latents, positions)."""
        heads = zip(pair, self.queries, self.keys, strict=True)
        return torch.stack([positions_ND[p] @ q.T @ k for p, q, k in heads]).sum(0)


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
