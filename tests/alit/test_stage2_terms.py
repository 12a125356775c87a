"""Stage 2's terms of the code and of the base tokenizer's own reconstruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from alit import AdaptiveTokenizer
from alit.losses.stage2 import reconstructions
from alit.training import TrainingConfig
from alit.training.stage2 import Stage2
from tests.helpers import models
from tests.helpers.models import BASES
from tests.helpers.runs import ALONE, config, gradients, noise_images

BASES_THAT_LEARN: dict[str, Any] = {
    "vae": BASES["vae"],
    "vqgan": BASES["vqgan"],
}


def small(base: str = "vae") -> AdaptiveTokenizer:
    torch.manual_seed(0)
    kind = {**BASES, **BASES_THAT_LEARN}[base]
    m = AdaptiveTokenizer(replace(models.config(), base=kind, image_size=(24, 24), iterations=2))
    return m


def stage2(**fields: Any) -> TrainingConfig:
    """Stage-2 configuration with only L1 and the quantizer's loss, and ``fields``."""
    return config(**{"stage": "2", "perceptual": "off", "gan_schedule": (), **fields})


def losses(m: AdaptiveTokenizer, x: Tensor, at: list[int], **fields: Any) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    loss, terms, _ = Stage2(m, stage2(**fields), ALONE).module(x, at, 0.0)
    return loss, terms


@pytest.mark.parametrize("at", [[0], [1], [0, 1]])
@pytest.mark.parametrize("base", ["vae", "dct"])
def test_code(base: str, at: list[int]) -> None:
    """The code term adds the weighted mean squared error of each iteration's code to the loss."""
    m, x = small(base), noise_images()
    torch.manual_seed(0)
    expected = {each.iteration: each for each in reconstructions(m.train(), x, at)}
    plain, without = losses(m, x, at)
    loss, terms = losses(m, x, at, code_weight=3.0)
    assert terms.keys() - without.keys() == {f"code_{t}" for t in at}
    for t, each in expected.items():
        torch.testing.assert_close(terms[f"code_{t}"], each.code.detach())
    share = sum(terms[f"code_{t}"] for t in at) / len(at)
    torch.testing.assert_close(loss, plain + 3 * share)
    assert terms["loss"] == loss and not terms["code_" + str(at[0])].requires_grad


def test_code_is_that_of_stage_1() -> None:
    """The code error is that of stage 1: against the base tokens that the encoder saw."""
    m, x = small("vqgan").eval(), noise_images()
    with torch.no_grad():
        found = list(reconstructions(m, x, [0, 1]))
        for iteration, each in zip(m.rollout(x), found, strict=True):
            assert iteration.prediction is not None
            code = mse_loss(iteration.prediction.code_BNC, iteration.base.code_BNC)
            torch.testing.assert_close(each.code, code)


@pytest.mark.parametrize("base", BASES_THAT_LEARN)
def test_base(base: str) -> None:
    """The base term adds the base's own L1 and regularizer once, for any number of iterations."""
    m, x = small(base), noise_images()
    fields = {"base_weight": 0.5, "regularizer": 0.2}
    plain, without = losses(m, x, [0, 1])
    found, drawn = losses(m, x, [0, 1], **fields), torch.get_rng_state()
    loss, terms = found
    assert terms.keys() - without.keys() == {"base_l1"}
    torch.manual_seed(0)
    list(reconstructions(m, x, [0, 1]))  # advances the random state as in the loss
    own, term = m.base_tokenizer.autoencode(x)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(terms["base_l1"], l1_loss(own, x).detach())
    torch.testing.assert_close(loss, plain + 0.5 * (l1_loss(own, x) + 0.2 * term))
    assert terms["loss"] == loss and not terms["base_l1"].requires_grad


def test_the_base_learns_from_its_own_tokens() -> None:
    """The base gets gradients from its own reconstruction beside those of the iterations."""
    x = noise_images()
    each = [
        gradients(Stage2(small("vqgan"), stage2(base_weight=weight, regularizer=0.0), ALONE), [x])[
            "model"
        ]
        for weight in (0.0, 1.0)
    ]
    assert each[0].keys() == each[1].keys()
    m = small("vqgan")
    l1_loss(m.base_tokenizer.autoencode(x)[0], x).backward()
    for name, p in m.named_parameters():
        if name.startswith("base_tokenizer"):
            torch.testing.assert_close(each[1][name] - each[0][name], p.grad, rtol=1e-3, atol=1e-6)
        elif name in each[0]:
            torch.testing.assert_close(each[1][name], each[0][name], rtol=1e-3, atol=1e-6)


def test_terms_in_the_log() -> None:
    stage = Stage2(small("vqgan"), stage2(code_weight=1.0, base_weight=0.5, regularizer=0.0), ALONE)
    terms = stage.step(1, 0.5, 1e-3, [noise_images()])
    assert terms.keys() == {"loss", "l1_1", "quantization_1", "code_1", "base_l1", "gradient_norm"}
    total = terms["l1_1"] + terms["quantization_1"] + terms["code_1"] + 0.5 * terms["base_l1"]
    torch.testing.assert_close(terms["loss"], total)


@pytest.mark.parametrize(
    ("base", "fields"), [("dct", {}), ("vae", {"train_base": False})], ids=["no weights", "frozen"]
)
def test_a_base_that_does_not_learn(base: str, fields: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^base_weight: expected 0 where no base learns, got 0\.5"
    ):
        Stage2(small(base), stage2(base_weight=0.5, **fields), ALONE)
    Stage2(small(base), stage2(**fields), ALONE)


@pytest.mark.parametrize("name", ["code_weight", "base_weight"])
@pytest.mark.parametrize("value", [-1.0, "much"])
def test_weights_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        stage2(**{name: value})
