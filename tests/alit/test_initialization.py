"""The transform coder that training can start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig
from alit.config import TransformerConfig
from alit.images import save_image, to_image
from alit.training import TrainingConfig, models, train
from alit.training.initialization import as_transform_coder
from alit.training.models import build

SHAPE = TransformerConfig(128, 3, 2)
OPTIONS: dict[str, Any] = {
    "base": "dct",
    "image_size": 64,
    "latents_per_iteration": 8,
    "code_dim": 9,
    "codebook_size": 256,
    "encoder": SHAPE,
    "decoder": SHAPE,
}


def pictures(count: int = 48) -> torch.Tensor:
    """Smooth random pictures: noise at two scales, (B, 3, 64, 64)."""
    draw = torch.Generator().manual_seed(3)
    noise = [torch.rand(count, 3, side, side, generator=draw) for side in (3, 10)]
    smooth = [torch.nn.functional.interpolate(x, size=(64, 64), mode="bicubic") for x in noise]
    return (0.6 * smooth[0] + 0.4 * smooth[1]).clamp(0, 1)


def started(**options: Any) -> AdaptiveTokenizer:
    torch.manual_seed(0)
    config = AdaptiveTokenizerConfig.of_size("nano", **{**OPTIONS, **options})
    model = AdaptiveTokenizer(config)
    as_transform_coder(model, pictures())
    return model.eval()


@torch.no_grad()
def test_describes_pictures_at_every_length() -> None:
    model, images = started(), pictures(16)
    target = model.base_tokenizer.encode(images).code_BNC
    nothing = (target - target.mean((0, 1))).square().mean()
    errors = []
    for iteration in model.rollout(images):
        assert iteration.prediction is not None
        errors.append((iteration.prediction.code_BNC - target).square().mean() / nothing)
    assert max(errors) < 0.75, errors
    assert min(errors[1:]) < 0.9 * errors[0], (
        "later iterations copy channels that the first leaves out"
    )
    assert max(errors[3:]) < 1.2 * min(errors), "the recurrence keeps what there is"


@torch.no_grad()
def test_codes_follow_their_place() -> None:
    """A change of two image tokens changes the codes of one latent most."""
    model, images = started(), pictures(1)
    changed = images.clone()
    changed[:, :, 16:32, 32:64] = 1 - changed[:, :, 16:32, 32:64]
    before, after = (next(model.rollout(x)).bottleneck.continuous_BLC[0] for x in (images, changed))
    moved = (before - after).norm(dim=-1)
    assert moved.argmax() == 1 * 2 + 1, moved
    assert moved.sort(descending=True).values[1] < 0.3 * moved.max()


@torch.no_grad()
def test_codebook_starts_where_the_codes_are() -> None:
    model = started(ema_decay=0.99)
    latents = next(model.rollout(pictures(32))).bottleneck.continuous_BLC
    codes = torch.nn.functional.normalize(latents, dim=-1)
    anywhere = AdaptiveTokenizer(model.config).quantize

    def distance(quantizer: torch.nn.Module) -> float:
        return float((codes - quantizer(latents).quantized).square().sum(-1).mean())

    assert distance(model.quantize) < 0.5 * distance(anywhere)
    torch.testing.assert_close(model.quantize.embed_avg, model.quantize.embedding.weight)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decoder": dataclasses.replace(SHAPE, layers=2)}, "model"),
        ({"bottleneck": "continuous"}, "bottleneck"),
        ({"latents_per_iteration": 4}, "latents_per_iteration"),
        ({"code_dim": 2}, "code_dim"),
        (
            {"encoder": TransformerConfig(128, 3, 8), "decoder": TransformerConfig(128, 3, 8)},
            "width",
        ),
        (
            {"encoder": TransformerConfig(128, 9, 2), "decoder": TransformerConfig(128, 9, 2)},
            "layers",
        ),
    ],
)
def test_unfit_models(options: dict[str, Any], named: str) -> None:
    config = AdaptiveTokenizerConfig.of_size("nano", **{**OPTIONS, **options})
    with pytest.raises(ValueError, match=f"^{named}: a transform coder needs"):
        as_transform_coder(AdaptiveTokenizer(config), pictures(4))


def test_a_run_starts_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made from the run's own pictures, by its seed, and not made again where the run goes on."""
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(pictures(20)):
        save_image(to_image(picture), tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "no.png").write_bytes(b"not a picture")
    options = {
        **OPTIONS,
        "encoder": dataclasses.asdict(SHAPE),
        "decoder": dataclasses.asdict(SHAPE),
    }
    described = TrainingConfig(
        **{"model": {"size": "nano", **options}, "initialization": "transform_coder"},
        **{
            "data": str(tmp_path / "photos"),
            "output": str(tmp_path / "run"),
            "learning_rate": 1e-9,
        },
        **{"steps": 2, "batch_size": 2, "workers": 0, "device": "cpu", "tensorboard": False},
    )
    torch.manual_seed(described.seed)
    start = build(described, None)
    train(described)
    after = AdaptiveTokenizer.from_pretrained(tmp_path / "run" / "model.safetensors")
    for name, weight in start.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), weight, atol=1e-6, rtol=0)
    monkeypatch.setattr(models, "as_transform_coder", lambda *_: pytest.fail("made again"))
    longer = dataclasses.replace(described, steps=3)
    assert train(longer, resume=True, allow_changes=True).steps == 3


def test_unfit_runs() -> None:
    with pytest.raises(ValueError, match="data: transform_coder needs a folder"):
        build(TrainingConfig(initialization="transform_coder", model=OPTIONS), None)
    with pytest.raises(ValueError, match="initialization: expected 'published' where start_from"):
        TrainingConfig(initialization="transform_coder", start_from="nano")
