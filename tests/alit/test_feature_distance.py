"""The perceptual distance on the features of EfficientNet-Lite1."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize

from alit.losses import FeatureDistance
from alit.losses.features import CODE, FILE, WEIGHTS
from alit.training import TrainingConfig
from alit.training.stage2 import Stage2
from tests.helpers.models import model
from tests.helpers.runs import ALONE, config

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (CODE, WEIGHTS)),
    reason="needs pip install 'alit[perceptual]'",
)


def smooth_images(side: int = 64, count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    few = torch.rand(count, 3, 9, 9, generator=draw)
    return interpolate(few, size=(side, side), mode="bicubic").clamp(0, 1)


@functools.cache
def distance() -> FeatureDistance:
    return FeatureDistance()


def plain() -> Any:
    """EfficientNet-Lite1 as its package makes it, with its weights."""
    from efficientnet_lite_pytorch import EfficientNet

    place = importlib.util.find_spec(WEIGHTS)
    assert place is not None and place.origin is not None
    network = EfficientNet.from_name("efficientnet-lite1")
    file = Path(place.origin).parent / FILE
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()


@installed
@torch.no_grad()
@pytest.mark.parametrize("side", [64, 96, 240])
def test_the_fused_network_is_the_plain_one(side: int) -> None:
    """Features of the fused network equal the plain one's at every resolution, after the head, and in their mean."""
    x, network = smooth_images(side, count=1), plain()
    outputs: list[Tensor] = []
    for block in network._blocks:
        block.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    head = network.extract_features((x * 255 - 127) / 128)
    last_of = {y.shape[-1]: y for y in outputs}
    expected = [last_of[side // stride] for stride in (4, 8, 16)]
    expected += [head, head.mean((2, 3), keepdim=True)]
    found = distance()._features(x)
    assert [y.shape[-1] for y in found] == [side // 4, side // 8, side // 16, head.shape[-1], 1]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, normalize(other, dim=1), atol=1e-4, rtol=1e-3)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in distance().modules())


@installed
def test_distance() -> None:
    """The distance of each pair is 0 for equal images, rises with their difference, and is symmetric."""
    x = smooth_images()
    blurred, more = (interpolate(avg_pool2d(x, n), scale_factor=n, mode="bicubic") for n in (4, 16))
    measure = distance()
    assert measure(x, x).tolist() == [0.0] * 3
    near, far = measure(x, blurred), measure(x, more)
    assert near.shape == (3,) and near.dtype == torch.float32
    assert bool((near > 0).all()) and bool((far > near).all())
    torch.testing.assert_close(measure(blurred, x), near)
    torch.testing.assert_close(measure(x[1:2], blurred[1:2]), near[1:2], atol=1e-6, rtol=1e-3)


@installed
def test_is_frozen() -> None:
    """Gradients go to reconstructions alone; training mode changes nothing."""
    measure = FeatureDistance().train()
    assert not any(part.training for part in measure.modules())
    assert not any(p.requires_grad for p in measure.parameters())
    x, y = smooth_images().requires_grad_(), (1 - smooth_images()).requires_grad_()
    measure(x, y).sum().backward()
    assert x.grad is None and y.grad is not None
    assert bool(y.grad.isfinite().all()) and bool(y.grad.flatten(1).any(1).all())
    before = {name: value.clone() for name, value in measure.state_dict().items()}
    measure(x, y)
    assert all(torch.equal(value, before[name]) for name, value in measure.state_dict().items())


@installed
def test_under_autocast() -> None:
    """Differences of features are computed in float32."""
    x, measure = smooth_images(), distance()
    y = (x + 0.01).clamp(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(measure(x, y.bfloat16()), measure(x, y.bfloat16().float()))


def stage2(**fields: Any) -> TrainingConfig:
    return config(**{"stage": "2", "perceptual": "efficientnet", "gan_schedule": (), **fields})


@pytest.mark.parametrize("missing", [CODE, WEIGHTS])
def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    here = found("torch")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else here
    )
    message = r"^perceptual: .*EfficientNet-Lite1.*pip install 'alit\[perceptual\]'"
    with pytest.raises(ValueError, match=message):
        FeatureDistance()
    with pytest.raises(ValueError, match=message):
        Stage2(model(image_size=(24, 24)), stage2(), ALONE)


@installed
def test_in_a_run() -> None:
    """A term of stage 2 with its weight, judged by frozen features."""
    x = smooth_images(24)
    stage = Stage2(model(image_size=(24, 24)), stage2(perceptual_weight=0.5), ALONE)
    loss, terms, pixels = stage.module(x, [1], 0.0)
    expected = distance()(x, pixels[1]).mean()
    torch.testing.assert_close(terms["perceptual_1"], expected, atol=1e-6, rtol=1e-3)
    total = terms["l1_1"] + 0.5 * terms["perceptual_1"] + terms["quantization_1"]
    torch.testing.assert_close(loss.detach(), total)
    assert not any("critics" in name or "network" in name for name in stage.model.state_dict())
