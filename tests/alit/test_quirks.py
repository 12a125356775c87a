"""Each field of Quirks makes the one difference to the published system that it names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, CodeError, FixedLength, MaxL1, Quirks
from alit.losses import Perceptual
from alit.training import TrainingConfig
from alit.training.processes import Processes
from alit.training.stage2 import Stage2
from tests.helpers.models import images, model


def pair(base: str, quirk: str, **options: Any) -> tuple[AdaptiveTokenizer, AdaptiveTokenizer]:
    """The corrected model, and one of the same weights with only this quirk."""
    corrected, quirky = (model(base, quirks=Quirks(**q), **options) for q in ({}, {quirk: True}))
    quirky.load_state_dict(corrected.state_dict())
    return corrected, quirky


def draws(m: AdaptiveTokenizer, **options: Any) -> int:
    """Number of random draws for halting in a rollout."""
    draw = Mock(side_effect=lambda p: torch.ones_like(p, dtype=torch.bool))
    list(m.rollout(images(), halting_draw=draw, **options))
    return draw.call_count


def test_halt_after_last_iteration() -> None:
    corrected, quirky = pair("vqgan", "halt_after_last_iteration", halting="mask")
    assert draws(corrected) == 3 and draws(quirky) == 4


def test_vae_halting_masks_nothing() -> None:
    models = pair("vae", "vae_halting_masks_nothing", halting="mask", halting_threshold=1e9)
    with torch.no_grad():
        corrected, quirky = (next(m.rollout(images())).halted for m in models)
    assert corrected.all() and not quirky.any()


def test_halt_only_at_predicted_iterations() -> None:
    corrected, quirky = pair("vqgan", "halt_only_at_predicted_iterations", halting="mask")
    assert draws(corrected, predict_at=(1,)) == draws(quirky, predict_at=(1,)) == 3, (
        "in evaluation all halt"
    )
    assert draws(corrected.train(), predict_at=(1,)) == 3
    assert draws(quirky.train(), predict_at=(1,)) == 1


def test_batch_mean_criterion() -> None:
    corrected, quirky = pair("dct", "batch_mean_criterion")
    x = torch.cat([images(3), images(1).mul(0).add(0.5)])
    with torch.no_grad():
        errors = [CodeError(0.0).error(iteration, corrected) for iteration in corrected.rollout(x)]
    threshold = float(errors[0].median()) + 1e-3
    calls: list[int] = []
    quirky.encoder.register_forward_hook(lambda *_: calls.append(1))
    shared = quirky.encode(x, CodeError(threshold)).lengths.tolist()
    assert len(set(shared)) == 1 and len(calls) == 4
    means = [float(error.mean()) for error in errors]
    chosen = next((i for i, mean in enumerate(means) if mean < threshold), 3)
    assert shared[0] == 3 * (chosen + 1)
    assert len(set(corrected.encode(x, CodeError(threshold)).lengths.tolist())) > 1


def test_unclamped_pixel_error() -> None:
    corrected, quirky = pair("dct", "unclamped_pixel_error")
    x = images(3)
    with torch.no_grad():
        *_, last = corrected.rollout(x)
        pixels = 3 * corrected.pixels(last.prediction) - 1  # beyond [0, 1]
        corrected.pixels = quirky.pixels = lambda _: pixels  # type: ignore[method-assign]
        for m, seen in ((corrected, pixels.clamp(0, 1)), (quirky, pixels)):
            error = (seen - x).abs().mean((1, 2, 3))
            torch.testing.assert_close(MaxL1(0.0).error(last, m), error)


def test_best_iteration_fallback() -> None:
    corrected, quirky = pair("dct", "best_iteration_fallback", seed=2)
    x = images(5)
    with torch.no_grad():
        errors = torch.stack(
            [MaxL1(0.0).error(iteration, corrected) for iteration in corrected.rollout(x)]
        )
    near = (errors <= 1.01 * errors.amin(0)).int()
    shortest, best = ((3 * (x.argmax(0) + 1)).tolist() for x in (near, -errors))
    assert corrected.encode(x, MaxL1(0.0)).lengths.tolist() == shortest
    assert quirky.encode(x, MaxL1(0.0)).lengths.tolist() == best
    assert best != shortest


def test_unquantized_tokens() -> None:
    corrected, quirky = pair("dct", "unquantized_tokens")
    plain, raw = (m.encode(images(), FixedLength(6)) for m in (corrected, quirky))
    assert torch.equal(quirky.quantize(raw.latents).index, plain.indices)
    torch.testing.assert_close(quirky.decode(raw), corrected.decode(plain))


def test_random_halting_in_evaluation() -> None:
    models = pair("vqgan", "random_halting_in_evaluation", halting="mask", halting_threshold=0.0)
    with torch.no_grad():
        corrected, quirky = (next(m.rollout(images())).halted for m in models)
    assert corrected.all() and not quirky.all()


def test_random_posterior_in_evaluation() -> None:
    corrected, quirky = pair("vae", "random_posterior_in_evaluation")
    tokens = [[m.rollout(images()).base.tokens_BCHW for _ in range(2)] for m in (corrected, quirky)]
    assert torch.equal(*tokens[0]) and not torch.equal(*tokens[1])


@torch.no_grad()
def test_vae_unit_range() -> None:
    corrected, quirky = pair("vae", "vae_unit_range")
    x = images()
    base, other = corrected.base_tokenizer, quirky.base_tokenizer
    torch.testing.assert_close(base.encode(x).tokens_BCHW, other.encode(2 * x - 1).tokens_BCHW)
    code = base.encode(x).code_BNC
    torch.testing.assert_close(base.pixels(code, (4, 6)), (other.pixels(code, (4, 6)) + 1) / 2)


@torch.no_grad()
def test_vae_scaled_decoding() -> None:
    corrected, quirky = pair("vae", "vae_scaled_decoding")
    code, scale = corrected.base_tokenizer.encode(images()).code_BNC, corrected.config.base.scale
    pixels = corrected.base_tokenizer.pixels(code, (4, 6))
    torch.testing.assert_close(pixels, quirky.base_tokenizer.pixels(code / scale, (4, 6)))
    assert not torch.allclose(pixels, quirky.base_tokenizer.pixels(code, (4, 6)))


def test_detached_base_codebook() -> None:
    for m, expected in zip(pair("vqgan", "detached_base_codebook"), (True, False), strict=True):
        prediction = next(m.rollout(images())).prediction
        (gradient,) = torch.autograd.grad(
            prediction.code_BNC.sum(), [m.base_tokenizer.codebook], allow_unused=True
        )
        assert (gradient is not None) == expected


def test_raw_codebook_entries() -> None:
    corrected, quirky = pair("dct", "raw_codebook_entries")
    index = torch.arange(5)
    raw = corrected.quantize.embedding.weight[:5]
    assert torch.equal(quirky.codes(index), raw)
    torch.testing.assert_close(corrected.codes(index), torch.nn.functional.normalize(raw, dim=-1))


NAMES = [field.name for field in dataclasses.fields(Quirks)]


def stage2_perceptual(monkeypatch: pytest.MonkeyPatch, **quirks: bool) -> Perceptual:
    """LPIPS of a stage-2 run, with random weights."""
    monkeypatch.setattr(Perceptual, "load_pretrained", lambda self: self)
    config = TrainingConfig(stage="2", gan_schedule=())
    stage = Stage2(model(quirks=Quirks(**quirks)), config, Processes(torch.device("cpu")))
    return stage.critics.perceptual


def test_perceptual_unit_range(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(2, 1, 3, 16, 16).unbind()
    published = stage2_perceptual(monkeypatch, perceptual_unit_range=True)
    corrected = stage2_perceptual(monkeypatch)
    corrected.load_state_dict(published.state_dict())
    torch.testing.assert_close(corrected(x, y), published(2 * x - 1, 2 * y - 1))


def test_perceptual_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(2, 1, 3, 16, 16).unbind()
    for dropout in (True, False):
        loss = stage2_perceptual(monkeypatch, perceptual_dropout=dropout)
        assert len({float(loss(x, y)) for _ in range(3)}) == (3 if dropout else 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_quirk_is_set_tested_and_documented(name: str) -> None:
    assert getattr(Quirks(), name) is False and getattr(Quirks.official(), name) is True
    assert f"test_{name}" in globals()
    assert f"`{name}`" in (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()


def test_compatibility_option() -> None:
    for name, quirks in (("corrected", Quirks()), ("official", Quirks.official())):
        assert AdaptiveTokenizerConfig.of_size("tiny", compatibility=name).quirks == quirks


def test_ema_rewrites_all_codes() -> None:
    growth = {}
    for rewrites in (False, True):
        quirks = Quirks(ema_rewrites_all_codes=rewrites)
        quantizer = model(metric="euclidean", ema_decay=0.99, quirks=quirks).quantize.train()
        before = quantizer.embedding.weight.clone()
        result = quantizer(torch.randn(1, 6))
        others = torch.arange(32) != result.index
        growth[rewrites] = (quantizer.embedding.weight / before)[others]
    assert bool((growth[False] == 1).all()) and bool((growth[True] > 1000).all())


def test_small_code_initialization() -> None:
    for small, expected in ((False, (128**-0.5, 12**-0.5)), (True, (0.02, 0.02))):
        torch.manual_seed(0)
        quirks = Quirks(small_code_initialization=small)
        m = AdaptiveTokenizer.from_size("nano", base="dct", quirks=quirks)
        for layer, std in zip(
            (m.pre_quantizer_mlp, m.decoder.decoder_embed), expected, strict=True
        ):
            assert abs(float(layer.weight.std()) / std - 1) < 0.15
