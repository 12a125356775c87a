"""Initialization of a model as a transform coder of residuals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, DCTConfig, FixedLength
from alit.config import TransformerConfig
from alit.layers import Block
from alit.training import initialization
from alit.training.coder_weights import FARTHEST, NOTHING, PAIRS_AWAY, ROWS_AWAY
from alit.training.initialization import as_transform_coder
from alit_kernels.nn import VectorQuantizer
from tests.helpers.coder import GRID, OPTIONS, SHAPE, smooth_images

PAIRS, ITERATIONS, WHOLE = 32, 4, 3


def seen(model: AdaptiveTokenizer) -> Tensor:
    """Base tokens (B, N, C) that the initialization is fitted to."""
    return model.base_tokenizer.encode(smooth_images(256)).code_BNC


def fresh(**options: Any) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(AdaptiveTokenizerConfig.of_size("nano", **{**OPTIONS, **options}))


@functools.cache
def started(lapped: bool = False) -> AdaptiveTokenizer:
    model = fresh(base=dataclasses.replace(OPTIONS["base"], lapped=lapped))
    as_transform_coder(model, seen(model), smooth_images(256))
    return model.eval().requires_grad_(False)


def paired(tokens_BNC: Tensor) -> Tensor:
    """Vectors of neighboring tokens in a row, (B, pairs, 2 C)."""
    return tokens_BNC.unflatten(1, (PAIRS, 2)).flatten(2)


class Coder:
    """Plain coder of residuals, fitted to the tokens ``seen``.

    Each iteration codes pairs by k-means, projected on their principal directions. Iteration 0 codes all pairs but
    three around a mean color of 10 levels, with the pairs' own mean colors as first directions.
    """

    def __init__(self, model: AdaptiveTokenizer) -> None:
        self.model, self.order = model, order_of_pairs(model)
        self.channels = [
            0,
            model.config.base.luma,
            model.config.base.luma + model.config.base.chroma,
        ]
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)[..., None, None]
        flat = model.base_tokenizer.encode(corners.expand(-1, -1, 64, 64)).code_BNC[
            :, 0, self.channels
        ]
        self.black, self.step = flat.amin(0), (flat.amax(0) - flat.amin(0)) / 9
        self.parts: list[tuple[Tensor, Tensor]] = []
        known = torch.zeros_like(seen(model))
        for t in range(ITERATIONS):
            known = self.after(seen(model), known, t)

    def after(self, tokens_BNC: Tensor, known: Tensor, t: int) -> Tensor:
        """Tokens decoded after iteration t, (B, N, C)."""
        told = torch.zeros_like(tokens_BNC)
        own = self.order if t else self.order[WHOLE:]
        missing = paired(tokens_BNC - known)[:, own]
        if t == 0:
            mean = tokens_BNC[..., self.channels].mean(1, keepdim=True)
            around = tokens_BNC.clone()
            around[..., self.channels] -= mean
            told[..., self.channels] = (
                (mean - self.black) / self.step
            ).round() * self.step + self.black
            missing = paired(around)[:, own]
        vectors = missing.flatten(0, 1)
        if len(self.parts) == t:
            first = torch.zeros(vectors.shape[1], 0)
            if t == 0:
                one = torch.eye(tokens_BNC.shape[2])[:, self.channels]
                first = torch.cat([one, one]) / math.sqrt(2)
            rest = vectors - vectors @ first @ first.T
            axes = torch.linalg.eigh((rest.T @ rest).double()).eigenvectors.float().flip(1)
            count = self.model.config.code_dim - first.shape[1]
            directions = torch.cat([first, axes[:, :count]], dim=1)
            k_means = VectorQuantizer(
                480 if t == 0 else 512, directions.shape[1], metric="euclidean"
            )
            k_means.initialize(vectors @ directions)
            self.parts.append((directions, k_means.embedding.weight.detach()))
        directions, codes = self.parts[t]
        coded = codes[torch.cdist(vectors @ directions, codes).argmin(-1)] @ directions.T
        told = paired(told)
        told[:, own] += coded.view(missing.shape)
        return known + told.view(known.shape)


def order_of_pairs(model: AdaptiveTokenizer) -> Tensor:
    """Index (pairs,), row by row, of the pair that each latent of an iteration describes, by its first token."""
    place = model.config.base.latent_channels + model.config.code_dim
    rows, columns = model.timestep_embedding[1, :, place : place + 2 * GRID].chunk(2, dim=1)
    return (rows.argmax(1) * GRID + columns.argmax(1)) // 2


def test_latents_describe_all_pairs() -> None:
    """Latents describe all pairs, the first few in all quarters of the image; three of iteration 0 the whole image."""
    model = started()
    order = order_of_pairs(model)
    assert sorted(order.tolist()) == list(range(PAIRS))
    quarters = {
        (x // (PAIRS // 2), x % (GRID // 2) // 2) for x in order[WHOLE : WHOLE + 8].tolist()
    }
    assert len(quarters) == 4
    place = model.config.base.latent_channels + model.config.code_dim
    first, second = model.timestep_embedding[:2, :, place : place + 2 * GRID]
    assert torch.equal(first[WHOLE:], second[WHOLE:]) and not first[:WHOLE].any()


@torch.no_grad()
@pytest.mark.parametrize("lapped", [False, True])
def test_latents_fetch_what_is_missing(lapped: bool) -> None:
    """An affine map of the latents predicts the missing pairs nearly as well, to a tenth, as their best projection."""
    model, images = started(lapped), smooth_images(32, seed=5)
    order, true = order_of_pairs(model), model.base_tokenizer.encode(images).code_BNC
    known = true.mean(1, keepdim=True)
    for iteration in model.rollout(images):
        own = iteration.bottleneck.continuous_BLC[:, -PAIRS:]
        pairs = paired(true - known)[:, order]
        if iteration.index == 0:
            own, pairs = own[:, WHOLE:], pairs[:, WHOLE:]
        own = pad(own.flatten(0, 1).double(), (0, 1), value=1.0)
        wanted = pairs.flatten(0, 1).double()
        told = wanted - own @ torch.linalg.lstsq(own, wanted).solution
        best = torch.linalg.svdvals(wanted - wanted.mean(0))[: model.config.code_dim].square().sum()
        there = (wanted - wanted.mean(0)).square().sum()
        assert there - told.square().sum() > 0.9 * best, iteration.index
        assert iteration.prediction is not None
        known = iteration.prediction.code_BNC


@torch.no_grad()
@pytest.mark.parametrize("lapped", [False, True])
def test_as_good_as_a_plain_coder(lapped: bool) -> None:
    """The model's code error is as low as a plain coder's at every iteration, and its pixel error in the mean.

    Which of two iterations codes more luma or chroma depends on the draw, and a plain base's code does not weight them
    as pixels do.
    """
    model, images = started(lapped), smooth_images(32, seed=5)
    torch.manual_seed(0)
    coder, true = Coder(model), model.base_tokenizer.encode(images).code_BNC
    known = torch.zeros_like(true)
    own, plain = [], []
    for iteration in model.rollout(images):
        known = coder.after(true, known, iteration.index)
        assert iteration.prediction is not None
        for x, errors in ((iteration.prediction.code_BNC, own), (known, plain)):
            pixels = model.base_tokenizer.pixels(x, (GRID, GRID))
            errors.append(torch.stack([(x - true).square().mean(), (pixels - images).abs().mean()]))
    ratio = torch.stack(own) / torch.stack(plain)
    assert (ratio[:, 0] <= 1.03).all() and ratio[:, 1].mean() <= 1.03, ratio
    assert own[3][0] < 0.3 * own[0][0], own
    assert own[3][0] < 0.1 * true.square().mean(), own


@torch.no_grad()
@pytest.mark.parametrize("lapped", [False, True])
def test_one_color(lapped: bool) -> None:
    """Three tokens code an image of one color as exactly as their levels allow; further ones do not make it worse."""
    model = started(lapped)
    draw = torch.Generator().manual_seed(7)
    images = torch.rand(16, 3, 1, 1, generator=draw).expand(-1, -1, 64, 64)
    index = model.encode(images, FixedLength(4 * PAIRS)).padded().long()
    codes_BLC = model.codes(index)
    errors = [
        float((model.pixels(model.predict(codes_BLC[:, :n])) - images).abs().mean())
        for n in (WHOLE, 8, PAIRS, 4 * PAIRS)
    ]
    levels = 512 // 50
    assert errors[0] < 0.5 / levels, errors
    assert all(after < before + 0.003 for before, after in itertools.pairwise(errors)), errors


@torch.no_grad()
@pytest.mark.parametrize("iteration", range(1, ITERATIONS))
def test_part_of_an_iteration(iteration: int) -> None:
    """With part of an iteration, pairs with a latent are decoded as with all, and the others do not change."""
    model, images = started(), smooth_images(8, seed=5)
    order, kept = order_of_pairs(model), 11
    codes_BLC = model.codes(model.encode(images, FixedLength(4 * PAIRS)).padded().long())
    n = iteration * PAIRS
    none, all_, some = (
        paired(model.predict(codes_BLC[:, :length]).code_BNC) for length in (n, n + PAIRS, n + kept)
    )
    there = torch.isin(torch.arange(PAIRS), order[:kept])
    scale = (all_ - none).square().mean().sqrt()
    assert (some - all_)[:, there].square().mean().sqrt() < 0.15 * scale
    assert (some - none)[:, ~there].square().mean().sqrt() < 0.15 * scale


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 9, 20])
def test_a_query_without_its_latent_mixes_those_that_are_there(n: int) -> None:
    """In iteration 0 a query without its latent mixes the present ones by distance, and the mean color."""
    model, images = started(), smooth_images(8, seed=5)
    codes_BLC = model.codes(model.encode(images, FixedLength(PAIRS)).padded().long())
    mean, told, all_ = (
        paired(model.predict(codes_BLC[:, :length]).code_BNC)
        for length in (WHOLE, WHOLE + n, PAIRS)
    )
    there = order_of_pairs(model)[WHOLE : WHOLE + n]
    rows, columns = (torch.arange(PAIRS) // (GRID // 2), torch.arange(PAIRS) % (GRID // 2))
    logits = -torch.tensor([*ROWS_AWAY, *[FARTHEST] * GRID])[(rows[:, None] - rows[there]).abs()]
    across = (columns[:, None] - columns[there]).abs()
    logits -= torch.tensor([*PAIRS_AWAY, *[FARTHEST] * GRID])[across]
    weights = pad(logits, (0, 1), value=-NOTHING).softmax(1)[:, :-1]
    expected = weights @ (all_ - mean)[:, there]
    assert (told - mean - expected).square().mean() < 0.1**2 * expected.square().mean()
    assert weights.sum(1).aminmax().min < 0.95


@torch.no_grad()
def test_the_last_layer_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fitted last layer lowers the error, in images too that it was not fitted to."""
    fitted = started()
    monkeypatch.setattr(initialization, "_fit_last_layer", lambda *_: None)
    plain, images = fresh(), smooth_images(64, seed=5)
    as_transform_coder(plain, seen(plain), images)
    own, without = (
        sum(
            float((x.prediction.code_BNC - x.base.code_BNC).square().mean())
            for x in model.rollout(images)
        )
        for model in (fitted, plain.eval())
    )
    assert own < without


def test_every_head_is_used() -> None:
    """In encoder and decoder a pair of heads carries values for each iteration, and one for the whole image."""
    model = started()
    for transformer in (model.encoder, model.decoder):
        carry = write = 0
        for block in transformer.transformer:
            assert isinstance(block, Block)
            values = block.attn.in_proj_weight.chunk(3)[2].unflatten(0, (SHAPE.heads, -1))
            written = block.attn.out_proj.weight.unflatten(1, (SHAPE.heads, -1))
            write += int(written.any(2).any(0).sum())
            carry += int((values.flatten(1).any(1) & written.any(2).any(0)).sum())
            assert not block.mlp.c_proj.weight.any()
        assert carry == write == 2 * ITERATIONS + 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recurrence": "latents"}, "recurrence"),
        ({"decoder": dataclasses.replace(SHAPE, layers=4)}, "model"),
        ({"image_size": (64, 72)}, "image_size"),
        ({"image_size": (64, 8)}, "image_size"),
        ({"latents_per_iteration": 31}, "latents_per_iteration"),
        ({"iterations": 6}, "heads"),
        ({"codebook_size": 99}, "codebook_size"),
        ({"base": DCTConfig(patch_size=8, luma=60, chroma=3)}, "width"),
        ({"code_dim": 25}, "code_dim"),
        ({"code_dim": 5}, "code_dim"),
        ({"metric": "cosine"}, "metric"),
        (
            {"encoder": TransformerConfig(96, 3, 6), "decoder": TransformerConfig(96, 3, 6)},
            "code_dim",
        ),
    ],
)
def test_unfit_models(options: dict[str, Any], named: str) -> None:
    model = fresh(**options)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{named}: a transform coder needs"):
        as_transform_coder(model, torch.zeros(1), torch.zeros(1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
