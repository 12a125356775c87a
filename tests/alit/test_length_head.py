"""Prediction of lengths in one pass: error curves, the length head, its training, budgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    AllOf,
    AnyOf,
    Budget,
    CodeError,
    FixedLength,
    MaxL1,
    Predicted,
    RelativeL1,
)
from alit.allocation import allocated
from alit.curves import l1_curves, measured
from alit.length_head import KINDS, curve_lengths, features_of
from alit.training import train
from alit.training.stage1 import Stage1
from tests.helpers.models import BASES, VARIANTS, images, model
from tests.helpers.runs import ALONE, config, gradients, log_of

pytestmark = pytest.mark.usefixtures("one_thread")


def features(m: AdaptiveTokenizer, x: Tensor) -> Tensor:
    return features_of(next(m.rollout(x)), m.base_tokenizer)


def with_head(*, trained: bool = True, **options: Any) -> AdaptiveTokenizer:
    """Model whose length head gives falling curves that depend on the image, near its errors."""
    m = model(length_head=True, **options)
    head = m.length_head
    with torch.no_grad():
        head.mean.copy_(features(m, images(8)).mean((0, 1)))
        head.out.bias.view(2, -1).copy_(-0.7 - 0.3 * torch.arange(len(head.lengths)))
        head.image_count.fill_(float(trained))
    return m


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("any_length", [False, True])
def test_measured_curves(base: str, any_length: bool) -> None:
    m, x = model(base, any_length=any_length), images()
    lengths = curve_lengths(m.config)
    assert lengths == ((4, 8, 12) if any_length else (3, 6, 9, 12))
    found = measured(m, x)
    assert found.errors_BKP.shape == (3, 2, len(lengths)) and len(found.bottlenecks) == 4
    for place, length in enumerate(lengths):
        pixels = m.decode(m.encode(x, FixedLength(length)))
        error = (pixels.clamp(0, 1) - x).abs().mean((1, 2, 3))
        torch.testing.assert_close(
            found.errors_BKP[:, KINDS.index("l1"), place], error, rtol=1e-4, atol=1e-4
        )
    with torch.no_grad():
        *_, last = m.rollout(x)
    for kind, criterion in (("l1", MaxL1(0.0)), ("code_error", CodeError(0.0))):
        expected = criterion.error(last, m)
        torch.testing.assert_close(found.errors_BKP[:, KINDS.index(kind), -1], expected)
    assert torch.equal(l1_curves(m, x), found.errors_BKP[:, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_curves_of_the_head_fall(variant: str) -> None:
    m, x = with_head(bottleneck=variant, any_length=True), images(4)
    x[1] = 0.5
    found, head = features(m, x), m.length_head
    tokens = m.num_image_tokens - 1
    assert bool(found.isfinite().all()) and found.shape == (4, tokens, head.mean.numel())
    curves = head(found)
    assert curves.shape == (4, 2, 3) and bool((curves.diff(dim=-1) <= 0).all())
    # An image's error is the mean of those of its patches.
    mean = head.of_patches(found).exp().mean(1).cummin(-1).values
    torch.testing.assert_close(curves.exp(), mean)
    assert not torch.allclose(curves[0], curves[1])


def test_features_know_how_busy_an_image_is() -> None:
    m = with_head()
    busy = images(1)
    smooth = torch.nn.functional.avg_pool2d(busy, 5, 1, 2)
    first, second = features(m, torch.cat([busy, smooth])).detach().mean(1)
    assert bool((first[-4:] > second[-4:]).all())


def test_a_recurrence_that_decodes_tells_what_is_missing() -> None:
    """The residual recurrence gives the head missing tokens, the same for any ``predict_at``, without more decoding."""
    m, x = with_head(recurrence="residual", codebooks="each"), images(4)
    asked, unasked = (next(m.rollout(x, predict_at=at)) for at in (None, ()))
    found = features_of(unasked, m.base_tokenizer).detach()
    torch.testing.assert_close(features_of(asked, m.base_tokenizer).detach(), found)
    channels = m.config.base.latent_channels
    missing = (asked.prediction.code_BNC - asked.base.code_BNC).detach().abs()
    own = slice(2 * channels, 3 * channels)
    torch.testing.assert_close(found[..., own].exp() - 1e-3, missing, rtol=1e-3, atol=1e-6)
    error = MaxL1(0.0).error(asked, m)
    torch.testing.assert_close(found[..., -2].exp().mean(1) - 1e-3, error.detach())
    assert found.shape[2] == len(m.length_head.mean)
    calls: list[int] = []
    m.decoder.register_forward_hook(lambda *_: calls.append(1))
    tokens = m.encode(x, Predicted(max_l1=0.4))
    predicting = len(calls)
    m.encode(x, FixedLength(tokens.lengths))
    assert len(calls) == 2 * predicting
    assert measured(m, x).features_BNF.shape == found.shape


@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "relative_l1"])
@torch.no_grad()
def test_predicted_lengths(kind: str, any_length: bool) -> None:
    """A predicted length is the first whose curve plus margin meets the limit, also in streams; nothing is decoded."""
    m, x = with_head(any_length=any_length), images(6)
    x[1] = 0.5 + 0.1 * (x[1] - 0.5)
    m.length_head.margin.copy_(torch.tensor([0.05, 0.1]))
    number = KINDS.index(kind.removeprefix("relative_"))
    curves = m.length_head(features(m, x))[:, number] + m.length_head.margin[number]
    if kind == "relative_l1":
        first = next(m.rollout(x)), m
        curves -= (MaxL1(0.0).error(*first) / RelativeL1(0.0).error(*first)).log()[:, None]
    limit = float(curves[:, 0].sort().values[2:4].mean().exp())
    near = curves <= curves[:, -1:] + torch.tensor(1.01).log()
    good = curves.exp() <= limit
    good = torch.where(good.any(1, keepdim=True), good, near)
    lengths = torch.tensor(curve_lengths(m.config))[good.int().argmax(1)].tolist()
    calls: list[int] = []
    m.decoder.register_forward_hook(lambda *_: calls.append(1))
    criterion = Predicted(**{f"max_{kind}": limit})
    tokens = m.encode(x, criterion)
    assert tokens.lengths.tolist() == lengths and len(set(lengths)) > 1
    stream = list(m.encode_stream(x, criterion, max_tokens_in_flight=120))
    assert [int(one.lengths) for one in stream] == lengths and not calls
    expected = m.encode(x, FixedLength(lengths))
    assert torch.equal(tokens.rows, expected.rows)
    least = m.encode(x, AnyOf(criterion, FixedLength(5))).lengths.tolist()
    assert least == [min(n, 5) for n in lengths]
    both = m.encode_stream(x, AllOf(criterion, FixedLength(5)), max_tokens_in_flight=120)
    assert [int(one.lengths) for one in both] == [max(n, 5) for n in lengths]


def test_one_look_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, looks = with_head(), images(6), []
    read = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: looks.append(1) or read(self))
    first = next(m.rollout(x))
    middle = float(
        m.length_head(features_of(first, m.base_tokenizer))[:, 0, 0].detach().median().exp()
    )
    planned = Predicted(max_l1=middle).planned(first, m, 0)
    assert len(looks) == 1 and len(set(read(planned.tokens))) > 1


def test_a_head_is_part_of_the_model(tmp_path: Path) -> None:
    """The head is saved in the model's file; it changes neither tokens nor the model's identity."""
    m, x = with_head(), images()
    m.save_pretrained(tmp_path / "m.safetensors")
    loaded = AdaptiveTokenizer.from_pretrained(tmp_path / "m.safetensors")
    criterion = Predicted(max_relative_l1=0.5)
    assert torch.equal(loaded.encode(x, criterion).rows, m.encode(x, criterion).rows)
    plain = model(any_length=True)
    state = {k: v for k, v in m.state_dict().items() if not k.startswith("length_head.")}
    plain.load_state_dict(state)
    assert plain.identity() == m.identity() == loaded.identity()
    found = gradients(Stage1(m, config(), ALONE), [images(4)])["model"]
    assert found and not [name for name in found if name.startswith("length_head.")]


def test_training_of_the_head(tmp_path: Path) -> None:
    """Training measures the curves, fits the head to tell images apart, and sets margins that hold for nine of ten."""
    chance = torch.Generator().manual_seed(0)
    contrast = torch.rand(96, 1, 1, 1, generator=chance)
    x = 0.5 + contrast * (images(96) - 0.5)
    m = model(any_length=True)
    before = {name: value.clone() for name, value in m.state_dict().items()}
    fields: dict[str, Any] = {"stage": "length", "steps": 24, "batch_size": 8, "flip": False}
    run = tmp_path / "run"
    result = train(
        config(**fields, learning_rate=None, output=str(run), log_every=24), model=m, images=x
    )
    assert result.model is m and m.config.length_head and float(m.length_head.image_count) > 0
    assert all(
        torch.equal(value, before[name]) for name, value in m.state_dict().items() if name in before
    )
    (line,) = log_of(run)
    assert line["fit"] < 0.3 and line["held_out"] < 0.2 and line["loss"] == line["l1"] > 0
    true = measured(m, x).errors_BKP[:, 0].cummin(1).values
    with torch.no_grad():
        curves = m.length_head(features(m, x))[:, 0].exp()
    correlation = torch.corrcoef(torch.stack([curves[:, -1], true[:, -1]]))[0, 1]
    assert float(correlation) > 0.95
    for limit in true.flatten().quantile(torch.tensor([0.3, 0.5, 0.7])).tolist():
        can = true[:, -1] < limit
        tokens = m.encode(x, Predicted(max_l1=limit))
        error = (m.decode(tokens).clamp(0, 1) - x).abs().mean((1, 2, 3))
        assert float((error <= limit)[can].float().mean()) > 0.75
    assert all(line[f"within_{kind}"] >= 0.9 for kind in KINDS)
    again = AdaptiveTokenizer.from_pretrained(run / "model.safetensors")
    criterion = Predicted(max_l1=0.2)
    assert torch.equal(again.encode(x, criterion).lengths, m.encode(x, criterion).lengths)


@pytest.mark.parametrize("length_head", [False, True])
@pytest.mark.parametrize("any_length", [False, True])
def test_budget(length_head: bool, any_length: bool) -> None:
    m, x = (with_head if length_head else model)(any_length=any_length), images(6)
    lengths = curve_lengths(m.config)
    curves = l1_curves(m, x)
    for mean in (lengths[0], 5, 7.4, 12):
        tokens = m.encode(x, Budget(mean))
        found = tokens.lengths.tolist()
        assert found == allocated(curves, lengths, int(6 * mean + 1e-6))
        assert sum(found) <= 6 * mean and set(found) <= set(lengths)
        assert torch.equal(tokens.rows, m.encode(x, FixedLength(found)).rows)


def test_allocation() -> None:
    """Allocation is the best of all ways on convex curves, never exceeds the total, and adds no useless tokens."""
    lengths = (4, 8, 12, 16)
    chance = torch.Generator().manual_seed(0)
    for trial in range(30):
        drops = torch.rand(4, 3, generator=chance)
        if trial % 2:
            drops = drops.sort(1, descending=True).values
        curves = torch.cat([torch.full((4, 1), 3.0), drops], 1).double()
        curves[:, 1:] = 3.0 - drops.cumsum(1)
        for total in (16, 22, 32, 45, 64):
            found = allocated(curves, lengths, total)
            assert sum(found) <= total and set(found) <= set(lengths)

            def error(chosen: tuple[int, ...], curves: Tensor = curves) -> float:
                return sum(float(curves[i, lengths.index(n)]) for i, n in enumerate(chosen))

            ways = itertools.product(lengths, repeat=4)
            best = min(error(way) for way in ways if sum(way) <= total)
            if trial % 2:
                assert error(tuple(found)) == pytest.approx(best)
            assert error(tuple(found)) <= error((4, 4, 4, 4)) + 1e-9
    rising = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 3.5, 1.0]])
    assert allocated(rising, lengths, 100) == [4, 16]
    assert allocated(rising, lengths, 19) == [4, 8]  # a part of the step to 16
    assert allocated(torch.zeros(3, 4), lengths, 99) == [4, 4, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Predicted, "Predicted: expected one of max_l1, max_code_error, max_relative_l1, got none"),
        (lambda: Predicted(max_l1=1, max_code_error=1), "got max_l1, max_code_error"),
        (lambda: Predicted(max_l1=-1), "max_l1: expected at least 0, got -1"),
        (lambda: Predicted(max_code_error="x"), "max_code_error: expected a number, got str"),
        (
            lambda: model().encode(images(), Predicted(max_l1=0.1)),
            "no length head; train one: alit train --stage length",
        ),
        (
            lambda: model().encode(images(), AnyOf(MaxL1(0.1), Predicted(max_l1=0.1))),
            "no length head; train one: alit train --stage length",
        ),
        (
            lambda: model().encode_stream([], Predicted(max_l1=0.1), max_tokens_in_flight=40),
            "no length head; train one",
        ),
        (
            lambda: with_head(trained=False).encode(images(), Predicted(max_l1=0.1)),
            "Predicted: the length head of these weights was not trained; train one",
        ),
        (
            lambda: with_head(trained=False).encode(images(), Budget(6)),
            "Budget: the length head of these weights was not trained",
        ),
        (lambda: model().encode(images(), Budget(2.9)), "mean_tokens: expected 3 to 12, .*got 2.9"),
        (lambda: model().encode(images(), Budget(13)), "mean_tokens: expected 3 to 12, .*got 13"),
        (lambda: Budget("x"), "mean_tokens: expected a number, got str"),
        (lambda: AnyOf(Budget(6), MaxL1(0.1)), "criteria: expected Budget alone"),
        (
            lambda: model().encode_stream([], Budget(6), max_tokens_in_flight=40),
            "criterion: a Budget is for images that are known together",
        ),
        (lambda: train(config(stage="length")), "start_from: stage length expects the model file"),
        (
            lambda: train(config(stage="length", steps=2), model=model(), images=images(4)),
            "steps: expected at least 10 images for a length head, got 8",
        ),
        (
            lambda: train(config(stage="length", seconds=3.0), model=model(), images=images(4)),
            "seconds: stage length ends after its steps",
        ),
    ],
    ids=range(17),
)
def test_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
