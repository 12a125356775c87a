"""The filter of decoded pixels: its results, where it is applied, and its separate training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from alit import AdaptiveTokenizer, FixedLength, MaxL1
from alit.base_config import DCTConfig
from alit.pixel_filter import PixelFilter
from alit.training import Interrupted, TrainingConfig, train
from alit.training.stage1 import Stage1
from tests.helpers.models import config as described
from tests.helpers.models import images, model
from tests.helpers.runs import ALONE, config, differing, gradients, log_of, state_of, stopping

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE_LEARNS = {
    **{"stage": "2", "perceptual": "off", "gan_schedule": (), "ssim_weight": 0.3, "ema": 0.0},
    **{"train_decoder": False, "train_encoder": False, "train_base": False},
}


def busy(m: AdaptiveTokenizer) -> AdaptiveTokenizer:
    """The model with random weights in the last layer of its filter, so that the filter has an effect."""
    with torch.no_grad():
        m.pixel_filter.last.weight.normal_(std=0.3)
    return m


def plain(m: AdaptiveTokenizer) -> AdaptiveTokenizer:
    """Model of the same weights without the filter."""
    other = model(any_length=m.config.any_length)
    state = {k: v for k, v in m.state_dict().items() if not k.startswith("pixel_filter.")}
    other.load_state_dict(state)
    return other


def test_it_adds_nothing_at_first_and_reaches_a_few_pixels() -> None:
    net, x = PixelFilter(8), torch.rand(2, 3, 24, 36, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(x), x)
    torch.nn.init.normal_(net.last.weight)
    changed = x.clone()
    changed[0, 1, 12, 20] += 0.5
    moved = (net(changed) - net(x)).abs().amax(1) > 0
    assert bool(moved[0, 12, 20]) and not moved[1].any()
    rows, columns = moved[0].nonzero().unbind(1)
    assert int(rows.min()) >= 6 and int(rows.max()) <= 19
    assert int(columns.min()) >= 14 and int(columns.max()) <= 27
    flat = torch.rand(8, 3, 1, 1).expand(-1, -1, 24, 36)
    torch.testing.assert_close(net(flat), flat, atol=1e-5, rtol=0)
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
def test_all_that_sees_pixels_sees_them_filtered(tmp_path: Path) -> None:
    """Decoding, pixel criteria and other sizes use the filter; tokens of given lengths do not change; files keep it."""
    m, x = busy(model(any_length=True, pixel_filter=4)), images()
    other = plain(m)
    tokens = m.encode(x, FixedLength(9))
    assert torch.equal(tokens.rows, other.encode(x, FixedLength(9)).rows)
    assert torch.equal(m.decode(tokens), m.pixel_filter(other.decode(tokens)))
    first = next(m.rollout(x))
    error = MaxL1(0.0).error(first, m)
    shown = m.pixels(first.prediction).clamp(0, 1)
    torch.testing.assert_close(error, (shown - x).abs().mean((1, 2, 3)))
    assert not torch.allclose(error, MaxL1(0.0).error(first, other), rtol=1e-3)
    wide = torch.rand(1, 3, 20, 32)
    decoded = m.decode(m.encode([wide[0]], FixedLength(9)))
    assert decoded[0].shape == wide[0].shape
    m.save_pretrained(tmp_path / "m.safetensors")
    assert m.identity() != other.identity()
    loaded = AdaptiveTokenizer.from_pretrained(tmp_path / "m.safetensors")
    assert torch.equal(loaded.decode(tokens), m.decode(tokens))


def smooth(count: int) -> Tensor:
    return avg_pool2d(images(count), 5, 1, 2)


def test_it_alone_learns(tmp_path: Path) -> None:
    """Only the filter changes, not even moving-average codebooks; the loss falls; a stopped run resumes bit for bit."""
    m, x = model(any_length=True, pixel_filter=8, ema_decay=0.9), smooth(8)
    before = {name: value.clone() for name, value in m.state_dict().items()}
    fields = {**ALONE_LEARNS, "steps": 40, "batch_size": 8, "learning_rate": 1e-2, "tail_drop": 0.5}
    run = tmp_path / "run"
    train(config(**fields, output=str(run), flip=False), model=m, images=x)
    changed = {
        name for name, value in m.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name, _ in m.named_parameters() if name.startswith("pixel_filter.")}
    losses = [line["loss"] for line in log_of(run)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    whole, half = tmp_path / "whole", tmp_path / "half"
    fields |= {"steps": 4, "batch_size": 4}

    def go_on(folder: Path, **options: Any) -> None:
        again = model(any_length=True, pixel_filter=8, ema_decay=0.9)
        train(config(**fields, output=str(folder)), model=again, images=x, **options)

    go_on(whole)
    with pytest.raises(Interrupted):
        go_on(half, on_log=stopping(2))
    go_on(half, resume=True)
    assert differing(state_of(whole), state_of(half)) == []


def test_stage_1_leaves_it() -> None:
    m = busy(model(pixel_filter=4))
    found = gradients(Stage1(m, config(), ALONE), [images(4)])["model"]
    assert found and not [name for name in found if name.startswith("pixel_filter.")]


def test_unfit() -> None:
    odd = {"base": DCTConfig(patch_size=3, luma=5, chroma=2), "image_size": (15, 24)}
    with pytest.raises(
        ValueError, match="pixel_filter: expected 0 with patches of 3 pixels, an odd"
    ):
        dataclasses.replace(described(), **odd, pixel_filter=4)
    with pytest.raises(
        ValueError, match="train_decoder: expected true, for this model has no pixel"
    ):
        train(config(**ALONE_LEARNS), model=model(), images=images(4))
    for field in ("train_encoder", "train_base"):
        with pytest.raises(ValueError, match=f"{field}: expected False without train_decoder"):
            TrainingConfig(**{**ALONE_LEARNS, field: True})
    with pytest.raises(ValueError, match="stage: expected '2' without train_decoder"):
        TrainingConfig(**{**ALONE_LEARNS, "stage": "1"})
