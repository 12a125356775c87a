"""Stage-2 losses by their formulas, and the parameters that get their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alit.losses import (
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    discriminator_loss,
    hinge_loss,
    pixel_loss,
)
from alit.losses.stage2 import last_layer, reconstructions
from tests.helpers.models import images, model


class Mean(nn.Module):
    """Discriminator whose logit is a scaled mean of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((1, 2, 3))


def test_generator_loss_is_its_formula() -> None:
    m, x, judge = model("vqgan"), images(), Mean()
    calls: list[int] = []
    m.encoder.register_forward_hook(lambda *_: calls.append(1))
    ((index, pixels, quantization, _),) = reconstructions(m, x, [1])
    assert len(calls) == 2 and index == 1
    loss, terms = pixel_loss(
        *(m, x, pixels, quantization, judge, lambda a, b: (a - b).square().mean((1, 2, 3))),
        gan_weight=0.8,
    )
    reconstruction = (x - pixels).abs().mean() + (x - pixels).square().mean()
    adversarial = -2 * pixels.mean()
    weight = m.base_tokenizer.vqgan.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(term, weight, retain_graph=True)[0].norm()
        for term in (reconstruction, adversarial)
    ]
    expected = 0.8 * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(terms["weight"], expected.detach())
    torch.testing.assert_close(loss, reconstruction + expected * adversarial + quantization)
    assert not terms["weight"].requires_grad
    loss, terms = pixel_loss(m, x, pixels, None, None, None, gan_weight=0.0)
    torch.testing.assert_close(loss, (x - pixels).abs().mean())
    assert terms.keys() == {"l1"}
    with pytest.raises(ValueError, match="at: expected at least one iteration"):
        next(reconstructions(m, x, []))


def test_discriminator_step_reaches_no_generator() -> None:
    m, x, judge = model("vqgan"), images(), Mean()
    ((_, pixels, _, _),) = reconstructions(m, x, [0])
    loss, terms = discriminator_loss(x, pixels, judge)
    loss.backward()
    assert judge.scale.grad is not None and judge.scale.grad != 0
    assert all(p.grad is None for p in m.parameters())
    torch.testing.assert_close(loss, hinge_loss(judge(x), judge(pixels)))
    torch.testing.assert_close(terms["real"], judge(x).mean())


def test_hinge_and_adaptive_weight() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert float(hinge_loss(real, fake)) == 0.5 * (0.5 + 1.0)
    p = nn.Parameter(torch.ones(2))
    assert float(adaptive_weight(3 * p.sum(), p.sum(), p)) == pytest.approx(3, rel=1e-3)
    assert float(adaptive_weight(1e9 * p.sum(), 0 * p.sum(), p)) == 1e4


def test_discriminator_shapes() -> None:
    judge = PatchDiscriminator(8)
    assert judge(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    biased = [name for name, p in judge.named_parameters() if name.endswith("bias") and p.ndim]
    assert "main.0.bias" in biased and "main.11.bias" in biased and "main.2.bias" not in biased


def test_where_gradients_are_compared() -> None:
    """Gradients are compared at the last layer that is trained."""
    for base, name in (("vqgan", "vqgan.decoder.conv_out"), ("vae", "vae.decoder.conv_out")):
        m = model(base)
        assert last_layer(m) is m.base_tokenizer.get_parameter(f"{name}.weight")
        m.base_tokenizer.requires_grad_(False)
        assert last_layer(m) is m.decoder.ffn[2].weight
    m = model("dct")
    assert last_layer(m) is m.decoder.ffn[2].weight
    m = model("dct", pixel_filter=4)
    assert last_layer(m) is m.pixel_filter.last.weight


def test_perceptual() -> None:
    measure, x = Perceptual(), torch.rand(2, 3, 32, 32)
    y = x.clone().requires_grad_()
    assert measure(x, y).tolist() == [0.0, 0.0]
    measure(x, y).sum().backward()
    assert y.grad is not None and bool(y.grad.isfinite().all())
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    measure(x[:1], black).sum().backward()
    assert black.grad is not None and bool(black.grad.isfinite().all())
    assert not any(p.requires_grad for p in measure.parameters())
    assert not measure.train().training and Perceptual(dropout=True).train().training
    # The gradients of the two ranges differ by the factor of the map between them.
    own = Perceptual(unit_range=True)
    own.load_state_dict(measure.state_dict())
    torch.testing.assert_close(own(2 * x - 1, 1 - x), measure(x, 1 - x / 2))


@pytest.mark.usefixtures("offline")
def test_perceptual_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"weights of VGG16 cannot be had .*no network.*put https"):
        Perceptual().load_pretrained()
    state = {}
    for number, slices in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), 1):
        part = Perceptual().net.get_submodule(f"slice{number}")
        for name in slices:
            for kind in ("weight", "bias"):
                state[f"features.{name}.{kind}"] = part.get_submodule(str(name)).get_parameter(kind)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: state)
    loaded = Perceptual().load_pretrained()
    assert torch.equal(loaded.net.slice5.get_submodule("28").weight, state["features.28.weight"])
    assert bool((loaded.lin0.model[1].weight >= 0).all())
