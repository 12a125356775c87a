"""Training through the residual recurrence: gradients, losses, moving averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from alit import AdaptiveTokenizer, DCTConfig
from alit.base.interface import to_grid
from alit.losses import stage1_loss
from alit.losses.stage2 import reconstructions
from alit.training import train
from tests.helpers import models
from tests.helpers.models import images
from tests.helpers.runs import config

#: Tokens of an iteration, iterations, class and 24 image tokens, as in ``tests.helpers.models``.
STEP, ITERATIONS, ROWS = 3, 4, 25


def model(**options: Any) -> AdaptiveTokenizer:
    return models.model(recurrence="residual", codebooks="each", **options)


def gradients(m: AdaptiveTokenizer, loss: Tensor) -> dict[str, Tensor]:
    """Parameter name -> gradient of ``loss``, for parameters that get one."""
    m.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("t", range(ITERATIONS))
@pytest.mark.parametrize("through_time", [True, False])
def test_gradients_end_where_an_iteration_begins(t: int, through_time: bool) -> None:
    """The encoder's gradient of the loss of iteration t is that of one step from the residual at t, with earlier tokens
    as constants; the decoder learns from all tokens.
    """
    m, x = model().train(), images()
    rollout = m.rollout(x, through_time=through_time)
    steps = [next(rollout) for _ in range(t + 1)]
    prediction = steps[t].prediction
    assert prediction is not None
    found = gradients(m, mse_loss(prediction.code_BNC, steps[t].base.code_BNC))

    base = m.base_tokenizer.encode(x)
    if t:
        decoded = steps[t - 1].decoded
        assert decoded is not None
        missing_BNC = (base.code_BNC - decoded.code_BNC).detach()
        tokens = m.image_tokens(x, to_grid(missing_BNC, m.config.grid)).detach()
        rows = m.next_input(tokens, tokens[:, :0], None, t)
    else:
        rows = m.first_input(x, base)
    fresh = m.encoder(rows)[:, ROWS:]
    assert isinstance(m.quantize, torch.nn.ModuleList)
    codes = m.quantize[t](m.pre_quantizer_mlp(m.encoder_ln_post(fresh))).quantized
    earlier = steps[t].bottleneck.codes_BLC[:, : t * STEP].detach()
    alone = m.predict(torch.cat([earlier, codes], dim=1))
    expected = gradients(m, mse_loss(alone.code_BNC, base.code_BNC))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name, atol=1e-6, rtol=1e-4)
    positions = found["decoder.latent_token_positional_embedding"]
    assert bool((positions[: (t + 1) * STEP] != 0).any(1).all()), "of earlier tokens too"
    assert not bool(positions[(t + 1) * STEP :].any())
    timesteps = found["timestep_embedding"].flatten(1).any(1).tolist()
    assert timesteps == [i == t for i in range(ITERATIONS)]


def test_only_wanted_iterations_record() -> None:
    """Only wanted iterations record gradients; the others run forward, and update their codebook's moving average."""
    m, x = model(ema_decay=0.9).train(), images()
    before = {k: v.clone() for k, v in m.state_dict().items() if k.startswith("quantize")}
    steps = list(m.rollout(x, predict_at=[2]))
    assert [step.prediction is not None for step in steps] == [False, False, True, False]
    assert [step.latents_BLD.requires_grad for step in steps] == [False, False, True, False]
    assert all(not s.decoded.code_BNC.requires_grad for s in steps if s.decoded and s.index != 2)
    moved = {
        k.split(".")[1] for k, v in m.state_dict().items() if k in before and not v.equal(before[k])
    }
    assert moved == {"2"}


def test_predict_later() -> None:
    """Predicting all iterations in one more run of the decoder gives the same loss and gradients."""
    m, x = model().train(), images()
    losses, found = [], []
    for together in (False, True):
        loss = stage1_loss(m, x, at=[0, 2, 3], together=together)
        losses.append(loss.total.detach())
        found.append(gradients(m, loss.total))
    torch.testing.assert_close(losses[0], losses[1])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name, atol=1e-5, rtol=1e-3)
    steps = list(m.rollout(x, predict_later=True))
    assert all(step.prediction is None for step in steps)
    assert all(step.decoded is not None for step in steps[:-1])
    assert not any(step.decoded.code_BNC.requires_grad for step in steps if step.decoded)


@pytest.mark.parametrize("tail_drop", [0.0, 1.0])
def test_losses_of_both_stages(tail_drop: float) -> None:
    m, x = model(any_length=True).train(), images()
    loss = stage1_loss(m, x, tail_drop=tail_drop)
    assert sorted(loss.iterations) == list(range(ITERATIONS))
    found = list(reconstructions(m, x, [1, 3], tail_drop=tail_drop))
    assert [each.iteration for each in found] == [1, 3]
    total = loss.total + sum(each.pixels.square().mean() + each.code for each in found)
    names = gradients(m, total).keys()
    unused = {"encoder_mask_token"}
    assert {name for name, _ in m.named_parameters()} - set(names) == unused


LAPPED = DCTConfig(patch_size=8, luma=5, chroma=2, lapped=True)


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_run(stage: str, recompute: bool) -> None:
    """A few steps with the shipped recipe's options give close losses in float32 and bfloat16."""
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        fields = {"base": LAPPED, "image_size": (32, 48), "any_length": True, "ema_decay": 0.9}
        m = AdaptiveTokenizer(replace(model().config, **fields))
        own: dict[str, Any] = {"code_weight": 1.0, "ssim_weight": 0.2}
        options = config(
            **{"stage": stage, "precision": precision, "steps": 3, "tail_drop": 0.5},
            **{"iterations_per_step": 2, "activation_checkpointing": recompute},
            **(own | {"perceptual": "off", "gan_schedule": ()} if stage == "2" else {}),
        )
        seen: list[float] = []
        x = torch.rand(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))
        train(options, model=m, images=x, on_log=lambda line, seen=seen: seen.append(line["loss"]))
        losses.append(seen)
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_encoder_may_stay_as_it_is(stage: str) -> None:
    """With ``train_encoder=False`` nothing before the quantizer changes; codebooks and the decoder do."""
    m = model(ema_decay=0.9, image_size=(24, 24))
    before = {name: x.clone() for name, x in m.state_dict().items()}
    fields: dict[str, Any] = {"perceptual": "off", "gan_schedule": ()} if stage == "2" else {}
    x = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    options = config(stage=stage, steps=2, ema=0.0, train_encoder=False, **fields)
    train(options, model=m, images=x)
    changed = {name for name, x in m.state_dict().items() if not torch.equal(x, before[name])}
    assert all(name.startswith(("decoder", "quantize.")) for name in changed)
    assert {"decoder.ffn.2.weight", "quantize.0.embedding.weight"} <= changed
    assert all(p.requires_grad for p in m.parameters())
