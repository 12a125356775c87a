"""The transform coder of residuals that training can start from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, DCTConfig, FixedLength
from alit.config import TransformerConfig
from alit.layers import Block
from alit.training import initialization
from alit.training.initialization import as_transform_coder
from tests.helpers.coder import GRID, OPTIONS, SHAPE, pictures

PAIRS, ITERATIONS = 32, 4


def seen(model: AdaptiveTokenizer) -> Tensor:
    """Tokens that the start is made of."""
    return model.base_tokenizer.encode(pictures(256)).code_BNC


def fresh(**options: Any) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    return AdaptiveTokenizer(AdaptiveTokenizerConfig.of_size("nano", **{**OPTIONS, **options}))


@functools.cache
def started(lapped: bool = False) -> AdaptiveTokenizer:
    model = fresh(base=dataclasses.replace(OPTIONS["base"], lapped=lapped))
    as_transform_coder(model, seen(model), pictures(256))
    return model.eval().requires_grad_(False)


def paired(tokens_BNC: Tensor) -> Tensor:
    """Neighbours in a row as one vector: (B, pairs, 2 C)."""
    return tokens_BNC.unflatten(1, (PAIRS, 2)).flatten(2)


class Step(NamedTuple):
    """Of a plain coder: directions (2 C, code channels) of a pair's vectors, and all that is known after it, (B, N,
    C).
    """

    directions: Tensor
    known: Tensor


def plain_coder(model: AdaptiveTokenizer, tokens_BNC: Tensor) -> Iterator[Step]:
    """Iteration by iteration: codes of what is missing, projected on the directions in which that varied most among
    the tokens ``seen``.
    """
    known, missing = torch.zeros_like(tokens_BNC), paired(seen(model)).flatten(0, 1)
    count = model.config.code_dim
    for t in range(ITERATIONS):
        codebook = model.get_parameter(f"quantize.{t}.embedding.weight")
        energy, axes = torch.linalg.eigh((missing.T @ missing / len(missing)).double())
        directions, scale = axes[:, -count:].float(), energy[-count:].sum().sqrt().float()

        def coded(
            vectors: Tensor, codes: Tensor = codebook, axes: Tensor = directions, to: Tensor = scale
        ) -> Tensor:
            nearest = torch.cdist(vectors @ axes / to, codes).argmin(-1)
            return codes[nearest] @ axes.T * to

        told = coded(paired(tokens_BNC - known).flatten(0, 1))
        known = known + told.reshape(known.shape)
        missing = missing - coded(missing)
        yield Step(directions, known)


def order_of_pairs(model: AdaptiveTokenizer) -> Tensor:
    """(pairs,) which pair, row by row, each latent of an iteration describes: where its first token is."""
    place = model.config.base.latent_channels + model.config.code_dim
    rows, columns = model.timestep_embedding[0, :, place : place + 2 * GRID].chunk(2, dim=1)
    return (rows.argmax(1) * GRID + columns.argmax(1)) // 2


def test_latents_describe_all_pairs() -> None:
    """The first few are spread over all quarters of the picture."""
    order = order_of_pairs(started())
    assert sorted(order.tolist()) == list(range(PAIRS))
    quarters = {(x // (PAIRS // 2), x % (GRID // 2) // 2) for x in order[:8].tolist()}
    assert len(quarters) == 4


@torch.no_grad()
@pytest.mark.parametrize("lapped", [False, True])
def test_latents_fetch_what_is_missing(lapped: bool) -> None:
    """At most a tenth of its variance is lost to an affine map, in every iteration."""
    model, images = started(lapped), pictures(32, seed=5)
    order, true = order_of_pairs(model), model.base_tokenizer.encode(images).code_BNC
    known = torch.zeros_like(true)
    for iteration, step in zip(model.rollout(images), plain_coder(model, true), strict=True):
        wanted = (paired(true - known)[:, order] @ step.directions).flatten(0, 1).double()
        own = iteration.bottleneck.continuous_BLC[:, -PAIRS:].flatten(0, 1).double()
        own = pad(own, (0, 1), value=1.0)
        missed = wanted - own @ torch.linalg.lstsq(own, wanted).solution
        lost = missed.square().sum() / (wanted - wanted.mean(0)).square().sum()
        assert lost < 0.1, iteration.index
        assert iteration.prediction is not None
        known = iteration.prediction.code_BNC


@torch.no_grad()
@pytest.mark.parametrize("lapped", [False, True])
def test_as_good_as_a_plain_coder(lapped: bool) -> None:
    """At the length of every iteration, by code and by pixels."""
    model, images = started(lapped), pictures(32, seed=5)
    true, errors = model.base_tokenizer.encode(images).code_BNC, []
    for iteration, (_, known) in zip(model.rollout(images), plain_coder(model, true), strict=True):
        assert iteration.prediction is not None
        found = [
            (
                (x - true).square().mean(),
                (model.base_tokenizer.pixels(x, (GRID, GRID)) - images).abs().mean(),
            )
            for x in (iteration.prediction.code_BNC, known)
        ]
        for own, plain in zip(*found, strict=True):
            assert own <= 1.03 * plain, iteration.index
        errors.append(float(found[0][0]))
    assert errors[3] < 0.3 * errors[0] < 0.1 * float(true.square().mean()), errors


@torch.no_grad()
@pytest.mark.parametrize("iteration", range(1, ITERATIONS))
def test_part_of_an_iteration(iteration: int) -> None:
    """Pairs whose latent is there are told as all are, others stay as they were."""
    model, images = started(), pictures(8, seed=5)
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
def test_a_query_without_its_latent_takes_the_nearest() -> None:
    """In iteration 0, where that is beside it; of others there is nothing to be had."""
    model, images = started(), pictures(8, seed=5)
    codes_BLC = model.codes(model.encode(images, FixedLength(PAIRS)).padded().long())
    order, across = order_of_pairs(model).tolist(), GRID // 2
    checked = 0
    for n in (1, 8, 16, 24):
        told = paired(model.predict(codes_BLC[:, :n]).code_BNC)
        contrast = told[:, order[:n]].square().mean().sqrt()
        there = torch.isin(torch.arange(PAIRS), torch.tensor(order[:n])).view(GRID, across)
        for row, column in (~there).nonzero().tolist():
            beside = [x for x in (row - 1, row + 1) if 0 <= x < GRID and there[x, column]]
            own = told[:, row * across + column]
            if len(beside) == 1:  # of two equally near ones it takes the mean
                near = told[:, beside[0] * across + column]
                assert (own - near).square().mean().sqrt() < 0.15 * contrast, (n, row, column)
                checked += 1
            elif n == 1:
                assert own.square().mean().sqrt() < 0.5 * contrast, (row, column)
    assert checked > 5


@torch.no_grad()
def test_the_last_layer_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes up for what is not linear before it, in pictures too that it was not fitted to."""
    fitted = started()
    monkeypatch.setattr(initialization, "_fit_last_layer", lambda *_: None)
    plain, images = fresh(), pictures(64, seed=5)
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
    """In encoder and decoder each pair of heads carries values for one iteration."""
    model = started()
    for transformer in (model.encoder, model.decoder):
        for block in transformer.transformer:
            assert isinstance(block, Block)
            values = block.attn.in_proj_weight.chunk(3)[2].unflatten(0, (SHAPE.heads, -1))
            written = block.attn.out_proj.weight.unflatten(1, (SHAPE.heads, -1))
            assert bool(values.flatten(1).any(1).all())
            assert bool(written.any(2).any(0).all())
            assert not block.mlp.c_proj.weight.any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recurrence": "latents"}, "recurrence"),
        ({"decoder": dataclasses.replace(SHAPE, layers=3)}, "model"),
        ({"image_size": (64, 72)}, "image_size"),
        ({"image_size": (64, 8)}, "image_size"),
        ({"latents_per_iteration": 31}, "latents_per_iteration"),
        ({"iterations": 5}, "heads"),
        ({"base": DCTConfig(patch_size=8, luma=60, chroma=3)}, "width"),
        ({"code_dim": 25}, "code_dim"),
        ({"metric": "cosine"}, "metric"),
        (
            {"encoder": TransformerConfig(96, 2, 6), "decoder": TransformerConfig(96, 2, 6)},
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
