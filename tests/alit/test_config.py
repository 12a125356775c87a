"""Configuration: names, JSON, errors."""

from __future__ import annotations

from typing import Any

import pytest

from alit import AdaptiveTokenizerConfig, DCTConfig, Quirks

from .models import BASES, config


@pytest.mark.parametrize("base", BASES)
def test_json_round_trip(base: str) -> None:
    original = config(base, quirks=Quirks(vae_unit_range=True), halting="mask", ema_decay=0.99)
    assert AdaptiveTokenizerConfig.from_json(original.to_json()) == original


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"base": {"kind": "jpeg"}}', '{"base": {"kind": "dct"}, "x": 1}']
)
def test_wrong_json(text: str) -> None:
    with pytest.raises(ValueError, match="configuration"):
        AdaptiveTokenizerConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "smal"}, "size: expected one of .*, got 'smal'; did you mean 'small'"),
        ({"base": "vqgn"}, "did you mean 'vqgan'"),
        ({"compatibility": "exact"}, "compatibility: expected one of"),
        ({"image_size": 250}, "image_size: .* multiple of the base's patch size 16"),
        ({"iterations": 0}, "iterations: expected a positive integer, got 0"),
        ({"bottleneck": "continous"}, "did you mean 'continuous'"),
        ({"halting": "soft"}, "halting: expected one of"),
        (
            {"size": "nano", "base": "vqgan"},
            "encoder.width: expected more than the 256 channels of the vqgan base, got 128; choose a",
        ),
        ({"base": DCTConfig, "luma": 300}, "luma: expected at most 256"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    def build() -> None:
        given = dict(options)
        if given.get("base") is DCTConfig:
            given["base"] = DCTConfig(luma=given.pop("luma"))
        AdaptiveTokenizerConfig.of_size(given.pop("size", "tiny"), **given)

    with pytest.raises(ValueError, match=message):
        build()
