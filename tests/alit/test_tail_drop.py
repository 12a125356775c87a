"""Nested dropout in training: the tokens that the decoder sees, and the losses on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import stage1_loss
from alit.losses.stage2 import reconstructions
from alit.losses.tails import kept_lengths
from alit.training.stage1 import Stage1
from alit.training.stage2 import Stage2
from tests.helpers.models import BASES, VARIANTS, images, model
from tests.helpers.runs import ALONE, Synchronizations, config, gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lengths_within_and_across_iterations() -> None:
    m, x = model(), images(1).expand(4000, -1, -1, -1)[:1]
    iteration = list(m.rollout(x, predict_at=()))[2]
    many = iteration.select(torch.zeros(6000, dtype=torch.int64))
    torch.manual_seed(0)
    lengths = kept_lengths(many, 3, 0.6)
    assert lengths.dtype == torch.int64
    counts = torch.bincount(lengths, minlength=10)
    assert counts[0] == 0 and len(counts) == 10
    # Of the images that drop tokens, half have lengths uniform in 7..9, half in 1..9; the others keep all.
    share = counts / 6000
    assert share[1:7].tolist() == pytest.approx([0.3 / 9] * 6, abs=0.01)
    assert share[7:9].tolist() == pytest.approx([0.1 + 0.3 / 9] * 2, abs=0.02)
    assert float(share[9]) == pytest.approx(0.4 + 0.1 + 0.3 / 9, abs=0.03)
    assert bool((kept_lengths(many, 3, 0.0) == 9).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_loss_of_the_first_tokens(base: str, variant: str) -> None:
    """Loss and gradients equal those of tokens cut by hand, with one decoder run for all iterations or one in each."""
    m, x, results = model(base, bottleneck=variant).train(), images(), []
    m.base_tokenizer.requires_grad_(False)
    tokens = m.base_tokenizer.encode(x)

    def by_hand() -> Tensor:
        total = torch.zeros(())
        for iteration in m.rollout(x, base=tokens, predict_at=()):
            lengths = kept_lengths(iteration, 3, 0.7).tolist()
            codes = iteration.bottleneck.codes_BLC
            parts = [
                m.predict(codes[b : b + 1, :n], None if y is None else y[b : b + 1])
                for b, (n, y) in enumerate(zip(lengths, [tokens.target_BN] * 3, strict=True))
            ]
            code = torch.cat([p.code_BNC for p in parts])
            weight = (2.5, 2.0, 1.5, 1.25)[iteration.index]
            error = (code - tokens.code_BNC).square().mean()
            if base == "vqgan":
                nll = torch.cat([p.nll_BN for p in parts]).mean()
                total = total + weight * nll + error
            else:
                total = total + weight * error
            if variant == "quantized":
                total = total + iteration.bottleneck.quantized.loss
        return total

    def one(together: bool) -> Callable[[], Tensor]:
        return lambda: stage1_loss(m, x, base=tokens, together=together, tail_drop=0.7).total

    for loss in (by_hand, one(True), one(False)):
        torch.manual_seed(3)
        m.zero_grad()
        value = loss()
        value.backward()
        results.append([value.detach(), *(p.grad for p in m.parameters() if p.grad is not None)])
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    torch.manual_seed(3)
    assert float(stage1_loss(m, x, base=tokens).total) != float(results[0][0])


@torch.no_grad()
def test_pixels_of_the_first_tokens() -> None:
    m, x = model("vqgan"), images()
    torch.manual_seed(1)
    found = list(reconstructions(m, x, [0, 2], tail_drop=1.0))
    torch.manual_seed(1)
    assert [each[0] for each in found] == [0, 2]
    for iteration in m.rollout(x, predict_at=()):
        if iteration.index in (0, 2):
            lengths = kept_lengths(iteration, 3, 1.0)
            expected = m.pixels(m.predict(iteration.bottleneck.codes_BLC, lengths_B=lengths))
            pixels = next(each[1] for each in found if each[0] == iteration.index)
            torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize(
    ("stage", "fields"), [(Stage1, {}), (Stage2, {"stage": "2", "gan_schedule": ()})]
)
def test_the_field_reaches_the_loss(stage: Any, fields: dict[str, Any]) -> None:
    """The field ``tail_drop`` changes the loss, with draws from the generator that a step seeds."""
    found = []
    for tail_drop in (0.0, 0.9, 0.9):
        torch.manual_seed(0)
        built = stage(model(), config(tail_drop=tail_drop, perceptual="off", **fields), ALONE)
        found.append(gradients(built, [images(4)])["model"]["decoder.ffn.2.weight"])
    assert not torch.allclose(found[0], found[1]) and torch.equal(found[1], found[2])


def test_no_synchronization_in_a_step() -> None:
    stage = Stage1(model(), config(tail_drop=0.5), ALONE)
    stage.step(0, 0.0, 1e-3, [images(2)])
    with Synchronizations() as seen:
        stage.step(1, 0.0, 1e-3, [images(2)])
    assert seen.places == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage1_loss(model(), images(), tail_drop=1.5), "tail_drop: expected a probab"),
        (
            lambda: stage1_loss(model(halting="mask"), images(), tail_drop=0.5),
            "tail_drop: halting 'mask' needs the prediction of all tokens",
        ),
        (
            lambda: list(reconstructions(model(halting="drop"), images(), [0], tail_drop=0.5)),
            "tail_drop: halting 'drop' needs",
        ),
        (lambda: config(tail_drop=1.1), r"tail_drop: expected a number in \[0, 1\]"),
        (
            lambda: Stage1(model(halting="mask"), config(tail_drop=0.1), ALONE),
            "tail_drop: halting 'mask' needs",
        ),
    ],
    ids=range(5),
)
def test_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
