"""Configuration: names, JSON, errors."""

from __future__ import annotations

from typing import Any

import pytest

from alit import AdaptiveTokenizerConfig, DCTConfig, KLVAEConfig, Quirks, VQGANConfig

from .models import BASES, config


@pytest.mark.parametrize("base", BASES)
def test_json_round_trip(base: str) -> None:
    original = config(base, quirks=Quirks(vae_unit_range=True), halting="mask", ema_decay=0.99)
    assert AdaptiveTokenizerConfig.from_json(original.to_json()) == original


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"base": {"kind": "jpeg"}}', '{"base": {"kind": "dct"}, "x": 1}'),
        "[" * 100_000,
    ],
    ids=range(6),
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
        ({"commitment": "x"}, r"commitment: expected a number in \[0, inf\), got 'x'"),
        ({"halting_threshold": "y"}, "halting_threshold: expected a number"),
        ({"dead_code_threshold": 5}, r"dead_code_threshold: expected a number in \[0, 1\), got 5"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
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


def test_wrong_convolutions() -> None:
    with pytest.raises(ValueError, match="stem: expected a positive integer, got 0"):
        KLVAEConfig(stem=0)
    with pytest.raises(ValueError, match="multipliers: expected at least one level"):
        VQGANConfig(multipliers=())
    with pytest.raises(ValueError, match="multipliers: expected a positive integer, got 0"):
        VQGANConfig(multipliers=(1, 0))


def test_a_list_of_sizes_is_a_tuple() -> None:
    """What a model file says of itself does not depend on how its size was given."""
    given = AdaptiveTokenizerConfig.of_size("tiny", image_size=[256, 256])  # type: ignore[arg-type]
    assert given == AdaptiveTokenizerConfig.of_size("tiny") and given.image_size == (256, 256)
