"""Stage-1 loss and loop on small models."""

from __future__ import annotations

import pytest
import torch

from alit import stage1_loss
from alit.training import Stage1Options, train_stage1

from .models import BASES, VARIANTS, images, model


def test_loss_is_its_formula() -> None:
    m, x = model("vqgan"), images()
    with torch.no_grad():
        loss = stage1_loss(m, x, weights=(2.5, 2.0))
        total = torch.zeros(())
        for iteration, weight in zip(m.rollout(x), (2.5, 2.0, 1.0, 1.0), strict=True):
            logits, target = iteration.prediction.decoded_BNV, iteration.base.target_BN
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            code = (
                (logits.softmax(-1) @ m.base_tokenizer.codebook - iteration.base.code_BNC)
                .square()
                .mean()
            )
            total += weight * nll + code + iteration.bottleneck.quantized.loss
    torch.testing.assert_close(loss.total, total)


def test_rollout_ends_with_the_last_iteration_needed() -> None:
    m, calls = model(), []
    m.encoder.register_forward_hook(lambda *_: calls.append(1))
    loss = stage1_loss(m, images(), at=[1])
    assert len(calls) == 2 and loss.iterations.keys() == {1}
    with pytest.raises(ValueError, match="at: expected at least one"):
        stage1_loss(m, images(), at=[])


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    m, x = model("vqgan", bottleneck="continuous"), images(4)
    before = {name: p.clone() for name, p in m.base_tokenizer.named_parameters()}
    seen = []
    errors = train_stage1(
        m,
        x,
        Stage1Options(seconds=60, max_steps=60, batch_size=4, first_only=0.7, flip=False),
        on_step=lambda step, done, error: seen.append((step, error)),
    )
    assert [step for step, _ in seen] == list(range(1, 61)) and [
        error for _, error in seen
    ] == errors
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
    assert not m.training
    assert all(p.requires_grad for p in m.base_tokenizer.parameters())
    assert all(torch.equal(p, before[name]) for name, p in m.base_tokenizer.named_parameters())


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="seconds"):
        Stage1Options(seconds=0)
    with pytest.raises(ValueError, match="batch_size"):
        Stage1Options(batch_size=0)
    with pytest.raises(ValueError, match="first_only"):
        Stage1Options(first_only=0.9)
    with pytest.raises(ValueError, match="images: expected at least a batch of 8, got 3"):
        train_stage1(model(), images(3), Stage1Options())


def test_a_loss_that_is_not_finite_stops() -> None:
    m = model()
    with torch.no_grad():
        m.latent_tokens.fill_(torch.inf)
    with pytest.raises(ValueError, match="loss: expected a finite value, got nan at step 0"):
        train_stage1(m, images(3), Stage1Options(seconds=5, batch_size=3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_bfloat16_autocast(base: str, variant: str) -> None:
    m, x = model(base, bottleneck=variant).train(), images()
    m.base_tokenizer.requires_grad_(False)
    exact = stage1_loss(m, x, generator=torch.Generator().manual_seed(0)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stage1_loss(m, x, generator=torch.Generator().manual_seed(0)).total
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
