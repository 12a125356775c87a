"""A start for training: weights with which a tokenizer is a transform coder of residuals, at every length.

From random weights a small tokenizer spends most of a short run finding out that a latent should look at some place and
say what is there. Here that is written into the weights, and everything else is left to training:

- Channels of the residual stream have roles: the base tokens' channels; content, what a latent says; a one-hot row,
  column and iteration; and flags of the kinds of token.
- A latent describes a pair of neighbouring image tokens. Iteration t owns two heads of one encoder layer, one for each
  of the pair, that send its fresh latents there and bring back what is missing yet, projected on the directions in
  which it varies most. Whoever has nothing to fetch attends to the class token, which holds nothing.
- Each iteration's codebook is k-means of what its latents then say.
- The same heads of the decoder send its queries to the latents that describe them and add up what these say, by the
  least-squares map from codes to what was missing. In iteration 0, a query whose latent is not there takes one that is
  next to it, if there is any: what is farther away says little of it.
- Other parts add nothing at first: their last layers are zero. The decoder's last layer is a least-squares fit to what
  its queries collected and to random features of that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alit_kernels import nearest_codeword
from alit_kernels.nn import VectorQuantizer

from ..codebooks import CodebookPerIteration
from ..config import AdaptiveTokenizerConfig
from ..tokenizer import AdaptiveTokenizer
from .coder_weights import PAIR, Roles, make_tokens, silence, write_decoder, write_encoder

#: Images at a time.
BATCH = 64
#: Added to the diagonal of the least-squares fit, as a share of its mean.
RIDGE = 1e-6


@torch.no_grad()
def as_transform_coder(model: AdaptiveTokenizer, tokens_BNC: Tensor, images: Tensor) -> None:
    """Give all but the base tokenizer the weights of a transform coder.

    Args:
        model: with ``recurrence="residual"``, a latent for two image tokens, and enough heads and channels.
        tokens_BNC: base tokens of many images, which projections and codebooks follow.
        images: (B, 3, height, width) in [0, 1], for the fit of the last layer: it runs the model.

    Raises:
        ValueError: a model of another shape.
    """
    _check(model.config)
    roles = Roles(model.config)
    make_tokens(model, roles)
    for transformer in (model.encoder, model.decoder):
        silence(transformer)
    missing = _pairs(tokens_BNC, roles).flatten(2).flatten(0, 1)
    for iteration in range(model.config.iterations):
        directions, size = _directions(missing, model.config.code_dim)
        missing = missing - _start_codebook(model, iteration, missing @ directions / size) @ (
            directions.T * size
        )
        write_encoder(model, roles, iteration, directions.T / size)
        write_decoder(model, roles, iteration, directions * size)
    _fit_last_layer(model, images)


def _check(config: AdaptiveTokenizerConfig) -> None:
    height, across = config.grid
    shape, room = config.encoder, config.encoder.width // config.encoder.heads
    slots, wanted = shape.layers * (shape.heads // PAIR), config.iterations
    roles = Roles(config)
    for argument, fits, expected in (
        ("recurrence", config.recurrence == "residual", "'residual'"),
        ("metric", config.metric == "euclidean", "'euclidean', in which codes add up"),
        ("model", shape == config.decoder, "encoder and decoder of one shape"),
        ("image_size", across % PAIR == 0, "an even number of image tokens in a row"),
        (
            "latents_per_iteration",
            PAIR * config.latents_per_iteration == height * across,
            f"half as many as image tokens, {height * across // PAIR}",
        ),
        ("heads", slots >= wanted, f"two heads of a layer for each of {wanted} iterations"),
        ("width", roles.width <= shape.width, f"a width of at least {roles.width}"),
        (
            "code_dim",
            max(config.code_dim, height + across + 2) <= room,
            f"code_dim and height + width + 2 of the grid within the {room} channels of a head",
        ),
    ):
        if not fits:
            raise ValueError(f"{argument}: a transform coder needs {expected}")


def _pairs(tokens_BNC: Tensor, roles: Roles) -> Tensor:
    """The two image tokens of each latent. (B, L, 2, C)"""
    rows, columns = roles.pairs.T
    first = rows * roles.grid[1] + columns
    return tokens_BNC[:, torch.stack([first, first + 1], dim=1)]


def _directions(vectors: Tensor, count: int) -> tuple[Tensor, float]:
    """Orthonormal directions (dim, count) of most energy, and the root mean square norm of what they carry."""
    energy, axes = torch.linalg.eigh((vectors.T @ vectors / len(vectors)).double())
    return axes[:, -count:].float(), math.sqrt(float(energy[-count:].sum()))


def _start_codebook(model: AdaptiveTokenizer, iteration: int, vectors: Tensor) -> Tensor:
    """k-means of the vectors (N, C); their codes."""
    assert isinstance(model.quantize, CodebookPerIteration)
    quantizer = model.quantize[iteration]
    assert isinstance(quantizer, VectorQuantizer)
    quantizer.initialize(vectors)
    quantizer.set_codebook(quantizer.embedding.weight)  # counts of a step, not of the sample
    return quantizer.codes(nearest_codeword(vectors, quantizer.embedding.weight))


def _fit_last_layer(model: AdaptiveTokenizer, images: Tensor) -> None:
    """The decoder's last layer: least squares over all images and lengths."""
    last = model.decoder.ffn.get_submodule("2")
    assert isinstance(last, nn.Linear)
    told = model.base_tokenizer.predict(torch.ones(1, 1, last.out_features), None).code_BNC[0]
    count = last.in_features + 1
    gram = last.weight.new_zeros(count, count, dtype=torch.float64)
    product = last.weight.new_zeros(count, last.out_features, dtype=torch.float64)
    inputs: list[Tensor] = []
    training = model.training
    model.eval()
    with last.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1))):
        for some in images.split(BATCH):
            for iteration in model.rollout(some):
                target = (iteration.base.code_BNC / told).flatten(0, 1).double()
                x = pad(inputs.pop(), (0, 1), value=1.0).double()
                gram += x.T @ x
                product += x.T @ target
    model.train(training)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, product)
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
