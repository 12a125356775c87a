"""Initial weights for training: with them a tokenizer is a transform coder of residuals, at every length.

From random weights a small tokenizer spends most of a short run finding out that a latent should look at some place and
say what is there. Here that is written into the weights, and everything else is left to training:

- Channels of the residual stream have roles: the base tokens' channels; content, what a latent says; a one-hot row,
  column and iteration; and flags of the kinds of token.
- The first three latents describe the whole image: along what images of one color differ in, its mean.
- Every other latent describes a pair of neighboring image tokens. Iteration t owns two heads of one encoder layer, one
  for each of the pair, that send its fresh latents there and bring back what is missing yet, in iteration 0 what
  differs from the mean, projected on the directions in which it varies most. Tokens with nothing to fetch attend to
  the class token, which holds nothing.
- Each iteration's codebook is k-means of what its latents then say, zero, and levels for the first three latents.
- The same heads of the decoder send its queries to the latents that describe them and add up what these say, by the
  least-squares map from codes to what was missing. In iteration 0, a query whose latent is not there takes those that
  are next to it, if there are any: what is farther away says little of it.
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
from ..console import report, reported
from ..tokenizer import AdaptiveTokenizer
from .coder_weights import (
    PAIR,
    WHOLE,
    Roles,
    apart,
    make_tokens,
    shares,
    silence,
    write_decoder,
    write_encoder,
    write_whole_decoder,
    write_whole_encoder,
)

#: Images at a time.
BATCH = 64
#: Added to the diagonal of the least-squares fit, as a share of its mean.
RIDGE = 1e-6
#: Codes of the codebook for each level that a token of the whole image has.
LINE = 50


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
    config = model.config
    _check(config)
    roles = Roles(config)
    make_tokens(model, roles)
    for transformer in (model.encoder, model.decoder):
        silence(transformer)
    doing = "fitting codebooks (k-means)", config.iterations, "codebooks"
    report(doing[0], 0, *doing[1:])
    missing = _first_iteration(model, roles, tokens_BNC).flatten(0, 1)
    for iteration in range(1, config.iterations):
        report(doing[0], iteration, *doing[1:])
        directions, size = _directions(missing, config.code_dim)
        vectors = missing @ directions / size
        # What is missing is as likely as its opposite.
        codebook = _codebook(config, torch.cat([vectors, -vectors]))
        _set_codebook(model, iteration, codebook)
        missing -= codebook[nearest_codeword(vectors, codebook)] @ (directions.T * size)
        write_encoder(model, roles, iteration, directions.T / size)
        write_decoder(model, roles, iteration, directions * size)
    _fit_last_layer(model, images)


def _first_iteration(model: AdaptiveTokenizer, roles: Roles, tokens_BNC: Tensor) -> Tensor:
    """Write iteration 0: tokens of the whole image say its mean color, those of pairs what they differ by from it.
    Returns what is missing then: (B, L, 2 C), in the latents' order.
    """
    config, pairs = model.config, _pairs(tokens_BNC, roles).flatten(2)
    flat, limits = _one_color(model, tokens_BNC)
    both = torch.cat([flat, flat]) / math.sqrt(PAIR)
    whole = pairs.mean(1) @ both
    own = (pairs - (whole @ both.T)[:, None])[:, WHOLE:].flatten(0, 1)
    directions, size = _directions(own, config.code_dim, both)

    count, each = config.codebook_size // LINE, torch.arange(WHOLE)
    low, high = (math.sqrt(PAIR) * limits).unbind(1)
    levels = torch.lerp(low[:, None], high[:, None], torch.linspace(0, 1, count).to(pairs))
    lines = pairs.new_zeros(WHOLE, count, config.code_dim)
    lines[each, :, each], lines[each, :, WHOLE + each] = levels / size, apart(config)
    vectors = own @ directions / size
    codebook = _codebook(config, vectors, reserved=WHOLE * count)
    _set_codebook(model, 0, torch.cat([codebook, lines.flatten(0, 1)]))

    nearest = (whole[..., None] - levels).abs().argmin(-1)
    missing = pairs - (levels[each.to(nearest), nearest] @ both.T)[:, None]
    codes = codebook[nearest_codeword(vectors, codebook)].unflatten(0, (len(pairs), -1))
    missing -= shares(roles)[:, WHOLE:].to(codes) @ codes @ (directions.T * size)
    write_encoder(model, roles, 0, directions.T / size)
    write_decoder(model, roles, 0, directions * size)
    write_whole_encoder(model, roles, math.sqrt(PAIR) / size * flat.T)
    write_whole_decoder(model, roles, flat * size / math.sqrt(PAIR))
    return missing


def _one_color(model: AdaptiveTokenizer, tokens_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions (C, ``WHOLE``) in which mean tokens of images of one color differ, first those in which
    the mean tokens given differ most; and the limits between which such images are, (``WHOLE``, 2).
    """
    images = _of_one_color(model.config, 2).to(tokens_BNC)
    colors = model.base_tokenizer.encode(images).code_BNC.mean(1)
    directions = torch.linalg.svd(colors - colors.mean(0)).Vh[:WHOLE].T
    means = tokens_BNC.mean(1) @ directions
    turned = directions @ torch.linalg.eigh(means.T.cov().double()).eigenvectors.flip(1).float()
    return turned, torch.stack((colors @ turned).aminmax(dim=0), dim=1)


def _check(config: AdaptiveTokenizerConfig) -> None:
    height, across = config.grid
    shape, room = config.encoder, config.encoder.width // config.encoder.heads
    slots, wanted = shape.layers * (shape.heads // PAIR), config.iterations + 1
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
        (
            "heads",
            slots >= wanted,
            f"two heads of a layer for each of {wanted - 1} iterations, and one more",
        ),
        ("width", roles.width <= shape.width, f"a width of at least {roles.width}"),
        (
            "codebook_size",
            config.codebook_size >= 2 * LINE,
            f"at least {2 * LINE} codes",
        ),
        (
            "code_dim",
            config.code_dim >= 2 * WHOLE and max(config.code_dim, height + across + 2) <= room,
            f"code_dim from {2 * WHOLE} to {room}, the channels of a head, and height + width + 2 of the grid within"
            " them",
        ),
    ):
        if not fits:
            raise ValueError(f"{argument}: a transform coder needs {expected}")


def _pairs(tokens_BNC: Tensor, roles: Roles) -> Tensor:
    """The two image tokens of each latent, (B, L, 2, C)."""
    rows, columns = roles.pairs.T
    first = rows * roles.grid[1] + columns
    return tokens_BNC[:, torch.stack([first, first + 1], dim=1)]


def _of_one_color(config: AdaptiveTokenizerConfig, levels: int) -> Tensor:
    """Images of one color each, (levels^3, 3, height, width): all combinations of levels of red, green and blue."""
    colors = torch.cartesian_prod(*[torch.linspace(0, 1, levels)] * 3)
    return colors[..., None, None].expand(-1, -1, *config.image_size)


def _directions(vectors: Tensor, count: int, first: Tensor | None = None) -> tuple[Tensor, float]:
    """Orthonormal directions (dim, count) of most energy, ``first`` (dim, n) among them, and the root mean square norm
    of the vectors' components along them.
    """
    first = vectors.new_zeros(vectors.shape[1], 0) if first is None else first
    rest = vectors - vectors @ first @ first.T
    axes = torch.linalg.eigh((rest.T @ rest / len(rest)).double()).eigenvectors.float()
    directions = torch.cat([first, axes.flip(1)[:, : count - first.shape[1]]], dim=1)
    return directions, math.sqrt(float((vectors @ directions).square().sum(1).mean()))


def _codebook(config: AdaptiveTokenizerConfig, vectors: Tensor, reserved: int = 0) -> Tensor:
    """Codebook of an iteration without the reserved codes, (K, code channels): zero, for nothing missing, and k-means
    of the vectors (N, code channels).
    """
    count = config.codebook_size - reserved - 1
    quantizer = VectorQuantizer(count, config.code_dim, metric="euclidean")
    quantizer.to(vectors.device).initialize(vectors)
    return torch.cat([vectors.new_zeros(1, vectors.shape[1]), quantizer.embedding.weight])


def _set_codebook(model: AdaptiveTokenizer, iteration: int, codebook: Tensor) -> None:
    assert isinstance(model.quantize, CodebookPerIteration)
    quantizer = model.quantize[iteration]
    assert isinstance(quantizer, VectorQuantizer)
    quantizer.set_codebook(codebook)


def _fit_last_layer(model: AdaptiveTokenizer, images: Tensor) -> None:
    """Fit the decoder's last layer by least squares over all images and lengths."""
    last = model.decoder.ffn.get_submodule("2")
    assert isinstance(last, nn.Linear)
    told = model.base_tokenizer.predict(torch.ones(1, 1, last.out_features), None).code_BNC[0]
    count = last.in_features + 1
    gram = last.weight.new_zeros(count, count, dtype=torch.float64)
    product = last.weight.new_zeros(count, last.out_features, dtype=torch.float64)
    inputs: list[Tensor] = []
    training = model.training
    model.eval()
    images = torch.cat([images, _of_one_color(model.config, 3).to(images)])
    with last.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1))):
        parts = images.split(BATCH)
        for some in reported(parts, "fitting the last layer", len(images), size=len):
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
