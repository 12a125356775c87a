"""The weights of a transform coder, written into a model: see :mod:`alit.training.initialization`."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import AdaptiveTokenizerConfig
from ..layers import Block, Transformer
from ..tokenizer import AdaptiveTokenizer

#: Heads of an iteration: one for each image token of a pair.
PAIR = 2
#: Tokens that describe the whole image, one for each direction in which images of one color differ.
WHOLE = 3
#: Logits: of each coordinate that matches, in encoder and decoder, and of the class token against them.
ENCODER_MATCH, DECODER_MATCH = 10.0, 15.0
ENCODER_SINK, DECODER_SINK, ELSEWHERE = 4.5, 2.6, 5.0
#: Logits, fitted to photographs, lost by a latent of iteration 0 that is so many rows, or pairs of columns, from the
#: query's pair; by those farther away; and by the class token, which says that a pair is like the whole image.
ROWS_AWAY, PAIRS_AWAY, FARTHEST, NOTHING = (0.0, 7.0, 8.2, 11.0), (0.0, 7.5, 8.5), 20.0, 9.0
#: Logit by which a query prefers the class token to tokens of the whole image: it then gets the sum of these, scaled.
SUMMED = math.log(100)
#: Constant of an image token beside its base tokens, which so nearly keep their magnitudes when it is normalized.
CONSTANT = 12.0
#: Gains of what latents fetch, of codes where they enter the decoder, of what its queries collect, and of the tanh's
#: input: small enough that normalizations and tanh are nearly linear.
FETCHED, EMBEDDED, COLLECTED, SQUASHED = 0.5, 0.1, 1 / 8, 1 / 16
#: Deviations of the weights and offsets of the tanh's other inputs, of which the fit of the last layer makes use.
CURVED, OFFSET = 0.25, 0.7


def size_of(width: int, flags: int) -> float:
    """Value of a flag of 1, less an unused channel, in a normalized token with ``flags`` of them. It is exact, since a
    small difference of large logits decides which tokens attend to the class token.
    """
    return math.sqrt(width / flags / (1 - flags / width))


class Roles:
    """Channels of the residual stream, as slices and numbers; ``width`` is their count."""

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        height, across = config.grid
        self.width = 0
        self.base = self._next(config.base.latent_channels)
        self.content = self._next(config.code_dim)
        self.place = self._next(height + across)
        self.iterations = self._next(config.iterations)
        # Normalization moves all channels of a token by their mean: it is read off the one that no token uses.
        flags = range(self.width, self.width + 5)
        self.is_class, self.is_image, self.is_whole, self.constant, self.unused = flags
        self.width += len(flags)
        self.grid = height, across

    @functools.cached_property
    def pairs(self) -> Tensor:
        """Row and first column of the pair that each latent describes, (latents, 2).

        The first ``WHOLE`` of iteration 0 describe the whole image instead, and so the first of later iterations
        describe pairs of which nothing was said yet.
        """
        height, across = self.grid
        order = torch.tensor(_scattered(height, across // PAIR)) * torch.tensor([1, PAIR])
        return order.roll(WHOLE, 0)

    def _next(self, count: int) -> slice:
        self.width += count
        return slice(self.width - count, self.width)

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """One-hot rows and columns: (N, place channels)."""
        height, across = self.grid
        one_hot = nn.functional.one_hot
        return torch.cat([one_hot(rows, height), one_hot(columns, across)], dim=1).float()

    def heads(self, transformer: Transformer, iteration: int) -> list[_Head]:
        """The two heads of one layer that an iteration owns."""
        turn, layer = divmod(iteration, len(transformer.transformer))
        block = transformer.transformer[layer]
        return [_Head.of(block, PAIR * turn + side) for side in range(PAIR)]

    def whole(self, transformer: Transformer) -> _Head:
        """Head of the tokens that describe the whole image: one that no iteration owns."""
        return self.heads(transformer, self.iterations.stop - self.iterations.start)[0]


def _scattered(height: int, across: int) -> list[tuple[int, int]]:
    """All places of a grid, each as far as possible from those before it, so that the first few cover the image."""
    left = [(row, column) for row in range(height) for column in range(across)]
    # A column of pairs is twice as wide as a row is high.
    apart = dict.fromkeys(left, math.inf)
    order = [min(left, key=lambda x: (x[0] - height // 2) ** 2 + 4 * (x[1] - across // 2) ** 2)]
    while len(order) < height * across:
        last = order[-1]
        apart.pop(last)
        for x in apart:
            apart[x] = min(apart[x], (x[0] - last[0]) ** 2 + 4 * (x[1] - last[1]) ** 2)
        order.append(max(apart, key=apart.__getitem__))
    return order


def make_tokens(model: AdaptiveTokenizer, roles: Roles) -> None:
    """Write the embeddings, the tokens, and the input and output projections of encoder and decoder."""
    config = model.config
    rows, columns = (
        x.flatten() for x in torch.meshgrid(*map(torch.arange, roles.grid), indexing="ij")
    )
    for name in ("encoder", "decoder"):
        model.get_parameter(f"{name}_class_embedding").zero_()[..., roles.is_class] = 2
        positions = model.get_parameter(f"{name}_positional_embedding").zero_()
        positions[1:, roles.place] = roles.places(rows, columns)
    model.encoder_positional_embedding[1:, roles.is_image] = 1
    model.decoder_mask_token.zero_()[..., roles.is_image] = 1
    model.patch_embed.weight.zero_()
    bias = model.patch_embed.get_parameter("bias").zero_()
    bias[roles.constant - config.base.latent_channels] = CONSTANT
    latents = torch.zeros(config.iterations, *model.latent_tokens.shape)
    latents[:, :, roles.place] = roles.places(*roles.pairs.T)
    latents[:, :, roles.iterations] = torch.eye(config.iterations)[:, None]
    whole = latents[0, :WHOLE]
    whole[:, roles.place], whole[:, roles.is_whole] = 0, 1
    model.latent_tokens.zero_()
    model.latent_token_positional_embedding.zero_()
    model.timestep_embedding.copy_(latents)
    # Codes of whole-image tokens lie apart from all others, and those of each apart from those of the rest.
    model.timestep_embedding[0, :WHOLE, roles.content][:, WHOLE : 2 * WHOLE] = torch.eye(WHOLE)
    decoder, read = model.decoder, model.pre_quantizer_mlp
    decoder.latent_token_positional_embedding.copy_(latents.flatten(0, 1))
    content = torch.eye(config.code_dim)
    for layer in (read, decoder.decoder_embed):
        layer.weight.zero_()
        layer.bias.zero_()
    read.weight[:, roles.content] = content / FETCHED
    read.weight[:, roles.unused] = -1 / FETCHED
    decoder.decoder_embed.weight[roles.content] = EMBEDDED * content
    first = decoder.ffn.get_submodule("0")
    assert isinstance(first, nn.Linear)
    count = roles.base.stop
    linear, curved = torch.eye(count) * SQUASHED, torch.randn(len(first.bias) - count, count)
    collected = torch.cat([linear, CURVED * curved]) / COLLECTED
    first.weight.zero_()
    first.weight[:, roles.base], first.weight[:, roles.unused] = collected, -collected.sum(1)
    first.bias.zero_()[count:].normal_(std=OFFSET)
    last = decoder.ffn.get_submodule("2")
    assert isinstance(last, nn.Linear)
    last.weight.zero_()
    last.weight[:, : roles.base.stop] = torch.eye(roles.base.stop) / SQUASHED
    last.bias.zero_()


def silence(transformer: Transformer) -> None:
    """Make all layers add nothing until heads are given something to fetch; queries ask for nothing."""
    for block in transformer.transformer:
        assert isinstance(block, Block)
        for layer in (block.mlp.c_proj, block.attn.out_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        assert bias is not None
        weight.unflatten(0, (3, -1))[0] = 0
        bias.zero_()


class _Head(NamedTuple):
    """Views of one head's weights: queries, keys and values (channels of the head, width), and their biases; its
    output projection (width, channels of the head)."""

    weight: Tensor
    bias: Tensor
    out: Tensor

    @classmethod
    def of(cls, block: nn.Module, head: int) -> _Head:
        assert isinstance(block, Block)
        attn = block.attn
        assert attn.in_proj_bias is not None
        by_head = (3, attn.heads, -1)
        return cls(
            attn.in_proj_weight.unflatten(0, by_head)[:, head],
            attn.in_proj_bias.unflatten(0, by_head)[:, head],
            attn.out_proj.weight.unflatten(1, by_head[1:])[:, head],
        )

    def carry(self, source: Tensor, channels: slice | list[int], roles: Roles) -> None:
        """Set the values to ``source`` (n, channels) of these channels, less the unused one; 0 for the class token."""
        self.weight[2], self.bias[2] = 0, 0
        self.weight[2, : len(source), channels] = source
        self.weight[2, : len(source), roles.unused] = -source.sum(1)

    def match(self, queries: Tensor, keys: Tensor, bias: Tensor, roles: Roles) -> None:
        """Set queries and keys, (n, width) each, whose products are the logits; ``bias`` (n,) is the queries'."""
        count, room = len(bias), self.weight.shape[1]
        root = math.sqrt(room)
        for weight in (queries, keys):
            weight[:, roles.unused] = -weight.sum(1)
        self.weight[0] = 0
        self.weight[0, :count], self.weight[1, :count] = queries * root, keys
        self.bias[0] = 0
        self.bias[0, :count] = bias * root


def write_encoder(
    model: AdaptiveTokenizer, roles: Roles, iteration: int, projection: Tensor
) -> None:
    """Write the heads by which fresh latents fetch the projection (code channels, 2 C) of what their pair misses."""
    heads = roles.heads(model.encoder, iteration)
    _ask_image_tokens(heads, roles, iteration, model.config)
    for each, own in zip(heads, projection.chunk(PAIR, dim=1), strict=True):
        _fetch(model, roles, each, own)


def write_whole_encoder(model: AdaptiveTokenizer, roles: Roles, projection: Tensor) -> None:
    """Write the head that subtracts what tokens of the whole image say, (``WHOLE``, C) of the mean, from pairs."""
    head, width = roles.whole(model.encoder), model.config.encoder.width
    queries, keys = torch.zeros(2, width), torch.zeros(2, width)
    keys[0, roles.is_image], keys[1, roles.is_class] = (
        1 / size_of(width, 4),
        1 / size_of(width, 1),
    )
    # All but the latents of pairs prefer the class token.
    bias = ENCODER_MATCH * torch.tensor([1.0, 2.0])
    queries[1, roles.iterations.start] = -bias[1] / size_of(width, 3)
    queries[1, roles.is_whole] = bias[1] / size_of(width, 3)
    head.match(queries, keys, bias, roles)
    _fetch(model, roles, head, -projection)


def _fetch(model: AdaptiveTokenizer, roles: Roles, head: _Head, projection: Tensor) -> None:
    """Make a head fetch the projection (n, C) of image tokens into the first n channels of content."""
    config = model.config
    ones = torch.ones(1, config.base.latent_channels, 1, 1)
    seen = model.base_tokenizer.tokens(ones).tokens_BCHW.flatten()
    seen = seen * size_of(config.encoder.width, 4) / CONSTANT
    head.carry(projection * FETCHED / seen, roles.base, roles)
    head.out[roles.content, : len(projection)] = torch.eye(config.code_dim)[:, : len(projection)]


def apart(config: AdaptiveTokenizerConfig) -> float:
    """Value of the channel of its own that each token of the whole image has in the vector that is quantized."""
    return size_of(config.encoder.width, 3) / FETCHED


def write_decoder(model: AdaptiveTokenizer, roles: Roles, iteration: int, inverse: Tensor) -> None:
    """Write the heads by which queries collect what their latent's code says: ``inverse`` (2 C, code channels)."""
    config, heads = model.config, roles.heads(model.decoder, iteration)
    _ask_latents(heads, roles, iteration, config)
    for each, own in zip(heads, inverse.chunk(PAIR), strict=True):
        _collect(model, roles, each, own / size_of(config.decoder.width, 3))


def write_whole_decoder(model: AdaptiveTokenizer, roles: Roles, inverse: Tensor) -> None:
    """Write the head by which queries collect what all tokens of the whole image say, ``inverse`` (C, ``WHOLE``)."""
    head, width = roles.whole(model.decoder), model.config.decoder.width
    queries, keys = torch.zeros(2, width), torch.zeros(2, width)
    # All others have a row, and so a logit far below, which may be inexact; that of whole-image tokens is exactly 0.
    rows = slice(roles.place.start, roles.place.start + roles.grid[0])
    keys[0, rows], keys[1, roles.is_class] = -1 / size_of(width, 3), 1 / size_of(width, 1)
    head.match(queries, keys, torch.tensor([DECODER_MATCH, SUMMED]), roles)
    own = EMBEDDED * apart(model.config)
    size = math.sqrt(width / (2 + own**2 - (2 + own) ** 2 / width))
    _collect(model, roles, head, inverse * (math.exp(SUMMED) + WHOLE) / size)


def _collect(model: AdaptiveTokenizer, roles: Roles, head: _Head, inverse: Tensor) -> None:
    """Make a head collect ``inverse`` (C, n) of the first n channels of content into the base channels."""
    ones = torch.ones(1, 1, model.config.base.latent_channels)
    told = model.base_tokenizer.predict(ones, None).code_BNC.flatten()
    count = inverse.shape[1]
    head.carry(torch.eye(count, model.config.code_dim) / EMBEDDED, roles.content, roles)
    head.out[roles.base, :count] = COLLECTED * inverse / told[:, None]


def _ask_image_tokens(
    heads: list[_Head], roles: Roles, iteration: int, config: AdaptiveTokenizerConfig
) -> None:
    """Make fresh latents attend to their pair, by row, column and image flag, and all others to the class token."""
    height, across = roles.grid
    width = config.encoder.width
    of_image, of_latent, of_class = (size_of(width, x) for x in (4, 3, 1))
    for side, head in enumerate(heads):
        queries, keys = (torch.zeros(height + across + 2, width) for _ in range(2))
        bias = torch.zeros(len(keys))
        place = torch.eye(height + across)
        keys[: len(place), roles.place] = place / of_image
        keys[-2, roles.is_image], keys[-1, roles.is_class] = 1 / of_image, 1 / of_class
        place[height:] = place[height:].roll(side, 0)  # the column beside that of the latent
        queries[: len(place), roles.place] = ENCODER_MATCH * place / of_latent
        bias[-2], bias[-1] = ENCODER_MATCH, ENCODER_SINK * ENCODER_MATCH
        queries[-1, roles.iterations.start + iteration] = -bias[-1] / of_latent
        head.match(queries, keys, bias, roles)


def _ask_latents(
    heads: list[_Head], roles: Roles, iteration: int, config: AdaptiveTokenizerConfig
) -> None:
    """Make queries attend to the latent of their pair, by row, column and iteration, or else to the class token."""
    height, across = roles.grid
    width = config.decoder.width
    of_token, of_class = size_of(width, 3), size_of(width, 1)
    column = torch.arange(across)
    for side, head in enumerate(heads):
        queries, keys = (torch.zeros(height + across + 2, width) for _ in range(2))
        bias = torch.zeros(len(keys))
        keys[: height + across, roles.place] = torch.eye(height + across) / of_token
        keys[-2, roles.iterations.start + iteration] = 1 / of_token
        keys[-2, roles.is_whole], keys[-1, roles.is_class] = -2 / of_token, 1 / of_class
        own = (column % PAIR == side).float()  # columns that this head describes
        if iteration:
            rows, columns = DECODER_MATCH * torch.eye(height), torch.zeros(across, across)
            columns[column - column % PAIR, column] = DECODER_MATCH * own
            bias[-2], sink = DECODER_MATCH, DECODER_SINK * DECODER_MATCH
        else:
            rows = _away(torch.arange(height), ROWS_AWAY)
            columns = _away(column // PAIR, PAIRS_AWAY) * own
            bias[-2], sink = FARTHEST, FARTHEST - NOTHING
        queries[:height, roles.place.start : roles.place.start + height] = rows / of_token
        queries[height:-2, roles.place.start + height : roles.place.stop] = columns / of_token
        # Tokens other than queries, and columns of the other head, have the class token's logit far above.
        bias[-1] = 2 * ELSEWHERE * DECODER_MATCH
        wanted = (sink - bias[-1]) / of_token
        queries[-1, roles.is_image] = wanted / 2
        queries[-1, roles.place.start + height : roles.place.stop] = wanted / 2 * own
        head.match(queries, keys, bias, roles)


def _away(places: Tensor, lost: tuple[float, ...]) -> Tensor:
    """Logits (N, N) of latents and queries at these rows or pairs of columns."""
    steps = (places[:, None] - places).abs()
    return -torch.tensor([*lost, FARTHEST])[steps.clamp(max=len(lost))]


def shares(roles: Roles) -> Tensor:
    """Attention of queries to the codes of pairs' latents in iteration 0: (pairs, latents), pairs in their order."""
    rows, columns = roles.pairs.T
    logits = _away(rows, ROWS_AWAY) + _away(columns // PAIR, PAIRS_AWAY)
    logits[:, :WHOLE] = -math.inf
    nothing = torch.full((len(logits), 1), -NOTHING)
    return torch.cat([logits, nothing], dim=1).softmax(1)[:, :-1]
