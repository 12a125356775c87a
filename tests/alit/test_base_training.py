"""Training of the base tokenizer: it alone learns, stage 1 reads its file, and the stem only changes the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from alit import AdaptiveTokenizer
from alit.base import build_base
from alit.base.convolution import ConvDecoder, ConvEncoder
from alit.base_config import DCTConfig, KLVAEConfig
from alit.config import Quirks
from alit.training import TrainingConfig, train
from tests.helpers.runs import SMALL, VAE, config, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

VQGAN: dict[str, Any] = {
    **{"kind": "vqgan", "latent_channels": 4, "num_codes": 16},
    **{"channels": 32, "multipliers": [1, 1], "blocks": 1},
}


def base_stage(base: dict[str, Any], **fields: Any) -> TrainingConfig:
    values: dict[str, Any] = {"stage": "base", "model": {**SMALL, "base": base}, "ema": 0.5}
    return config(**{**values, "steps": 40, "learning_rate": 3e-3, **fields})


def gradients() -> torch.Tensor:
    """Four images of smooth color gradients, (4, 3, 32, 32)."""
    ramp = torch.linspace(0, 1, 32)
    planes = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32)])
    return torch.stack([planes[[i % 2, i // 2, 1]] for i in range(4)])


@pytest.mark.parametrize("base", [VAE, VQGAN], ids=["vae", "vqgan"])
def test_only_the_base_learns_and_stage_1_takes_it(tmp_path: Path, base: dict[str, Any]) -> None:
    torch.manual_seed(0)
    records: list[dict[str, float]] = []
    settings = base_stage(base, output=str(tmp_path / "base"))
    model = train(settings, images=gradients(), on_log=records.append).model
    assert records[-1]["l1"] < 0.6 * records[0]["l1"]
    torch.manual_seed(settings.seed)
    fresh = AdaptiveTokenizer.from_size("nano", **_as_arguments(model)).state_dict()
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, fresh[name])
        assert same != name.startswith("base_tokenizer."), name

    file = tmp_path / "base" / "model.safetensors"
    later = base_stage(
        {"kind": "dct"}, stage="1", base_from=str(file), steps=1, output=str(tmp_path / "1")
    )
    train(later, images=gradients())
    stored = weights_of(tmp_path / "1")
    for name, tensor in load_file(file).items():
        if name.startswith("base_tokenizer."):
            assert torch.equal(stored[name], tensor), name


def _as_arguments(model: AdaptiveTokenizer) -> dict[str, Any]:
    fields = ("base", "encoder", "decoder", "image_size", "latents_per_iteration")
    return {x: getattr(model.config, x) for x in (*fields, "iterations", "codebook_size")}


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        ({"kind": "dct"}, {}, "no weights"),
        (VAE, {"parallel": "fsdp"}, "parallel"),
        (VAE, {"regularizer": -1.0}, "regularizer"),
        (VAE, {"stage": "0"}, "stage"),
    ],
)
def test_what_does_not_fit_is_named(
    base: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(base_stage(base, **fields), images=gradients())


def test_the_stem_only_rearranges_pixels() -> None:
    torch.manual_seed(0)
    layout: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "plain": False}
    images = torch.rand(2, 3, 16, 16)
    encoder = ConvEncoder(4, stem=4, **layout)
    inner = encoder(images)
    encoder.stem = 1
    assert torch.equal(encoder(pixel_unshuffle(images, 4)), inner)
    decoder = ConvDecoder(4, stem=4, **layout)
    pixels = decoder(inner)
    decoder.stem = 1
    assert torch.equal(pixel_shuffle(decoder(inner), 4), pixels)
    assert inner.shape == (2, 4, 2, 2) and pixels.shape == images.shape
    assert KLVAEConfig(multipliers=(1, 1), stem=4).patch_size == 8


def test_the_transform_starts_as_the_dct() -> None:
    torch.manual_seed(0)
    described = KLVAEConfig(
        latent_channels=16,
        scale=1.0,
        channels=32,
        multipliers=(1, 1),
        blocks=1,
        attention_levels=(),
        stem=4,
        transform=True,
    )
    vae = build_base(described, Quirks()).eval()
    dct = build_base(DCTConfig(patch_size=8, luma=10, chroma=3), Quirks())
    images = torch.rand(2, 3, 16, 24)
    tokens, expected = vae.encode(images), dct.encode(images)
    torch.testing.assert_close(tokens.tokens_BCHW, expected.tokens_BCHW, rtol=1e-4, atol=1e-5)
    pixels = vae.pixels(tokens.code_BNC, (2, 3))
    torch.testing.assert_close(pixels, dct.pixels(expected.code_BNC, (2, 3)), rtol=1e-4, atol=1e-5)
    for parameter in vae.parameters():
        assert parameter.requires_grad
