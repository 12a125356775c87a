"""Configuration: names, JSON, errors."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alit import (
    AdaptiveTokenizerConfig,
    DCTConfig,
    KLVAEConfig,
    Quirks,
    TransformerConfig,
    VQGANConfig,
)
from alit.training import TrainingConfig
from tests.helpers.hostile import EXAMPLES, memory
from tests.helpers.hostile_json import mutated_json
from tests.helpers.models import BASES, config


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
        ({"iterations": 0}, "iterations: expected an integer in .1, 65536., got 0"),
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
        ({"base": partial(DCTConfig, luma=300)}, "luma: expected an integer in .1, 256., got 300"),
        ({"base": partial(KLVAEConfig, stem=0)}, "stem: expected an integer in .1, 64., got 0"),
        (
            {"base": partial(VQGANConfig, multipliers=())},
            "multipliers: expected at least one level",
        ),
        (
            {"base": partial(VQGANConfig, multipliers=(1, 0))},
            "multipliers: expected an integer in",
        ),
        (
            {"base": partial(VQGANConfig, multipliers=(1, 4096))},
            "multipliers: expected at most 65536",
        ),
        (
            {"base": partial(KLVAEConfig, stem=8)},
            "patch_size: expected at most 64 pixels, got 128",
        ),
        (
            {"encoder": TransformerConfig(512, 1, 1), "bottleneck": "unfactorized"},
            "decoder.width: ",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    def build(size: str = "small", base: Any = "vqgan", **others: Any) -> None:
        base = base() if callable(base) else base
        AdaptiveTokenizerConfig.of_size(size, base=base, **others)

    with pytest.raises(ValueError, match=message):
        build(**options)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of width 32, got 3"):
        TransformerConfig(32, 1, 3)


def test_a_list_of_sizes_is_a_tuple() -> None:
    """An image size given as a list is stored as a tuple, so equal configurations compare equal."""
    given = AdaptiveTokenizerConfig.of_size("tiny", image_size=[256, 256])  # type: ignore[arg-type]
    assert given == AdaptiveTokenizerConfig.of_size("tiny") and given.image_size == (256, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ('"iterations": 4', '"iterations": 4.0'),
            "iterations: expected an integer in .1, 65536., got 4.0",
        ),
        (
            ('"iterations": 4', '"iterations": "4"'),
            "iterations: expected an integer in .1, 65536., got '4'",
        ),
        (
            ('"iterations": 4', '"iterations": [4]'),
            r"iterations: expected an integer in .1, 65536., got \[4\]",
        ),
        (
            ('"iterations": 4', '"iterations": true'),
            "iterations: expected an integer in .1, 65536., got T",
        ),
        (('"iterations": 4', '"iterations": NaN'), "NaN is no number of JSON"),
        (('"iterations": 4', '"iterations": -Infinity'), "-Infinity is no number of JSON"),
        (('"iterations": 4', '"iterations": 4, "iterations": 5'), "iterations is there twice"),
        (
            ('"iterations": 4', f'"iterations": {"9" * 4000}'),
            "iterations: expected an integer in .1, 65536., got",
        ),
        (('"iterations": 4', f'"iterations": {"9" * 5000}'), "configuration: expected JSON"),
        (('"iterations": 4', '"iterations": 4, "more": 5'), "configuration: more: no such field"),
        (
            ('"layers": 2', '"layers": 2, "more": 5'),
            r"configuration: (de|en)coder.more: no such field",
        ),
        (('"layers": 2', '"layer": 2'), r"configuration: (de|en)coder.layer: no such field"),
        (('"layers": 2, ', ""), r"configuration: (de|en)coder.layers: expected it, got none"),
        (
            ('"vae_unit_range": false', '"vae_unit_range": 1'),
            "quirks.vae_unit_range: expected true or",
        ),
        (('"commitment": 0.25', '"commitment": 1e999'), "commitment: expected a number"),
        (('"commitment": 0.25', f'"commitment": {"9" * 400}'), "commitment: expected a number"),
        (('"image_size": [16, 24]', '"image_size": 16'), "image_size: expected a list of integers"),
        (
            ('"image_size": [16, 24]', '"image_size": [16.0, 24]'),
            "image_size: expected an integer in",
        ),
        (
            ('"image_size": [16, 24]', '"image_size": [16, 24, 8]'),
            "image_size: expected .height, width",
        ),
        (('"bottleneck": "quantized"', '"bottleneck": ["x"]'), "bottleneck: expected one of"),
        (('"scale": 0.2325', '"scale": 0'), "base.scale: expected a number above 0"),
        (('"transform": false', '"transform": "no"'), "base.transform: expected true or false"),
        (
            ('"attention_levels": [2]', '"attention_levels": [-1]'),
            "base.attention_levels: expected",
        ),
        (('"multipliers": [1, 1, 1]', '"multipliers": "111"'), "base.multipliers: expected a list"),
        (('"channels": 32', '"channels": 40'), "base.channels: expected a multiple of 32"),
        (('"kind": "vae"', '"kind": ["vae"]'), "base.kind: expected one of vqgan, vae, dct"),
        (('"quirks": {', '"quirks": null, "x": {'), "quirks: expected an object, got None"),
    ],
    ids=range(27),
)
def test_wrong_fields_of_json(change: tuple[str, str], message: str) -> None:
    text = config("vae").to_json()
    assert change[0] in text
    with pytest.raises(ValueError, match=message):
        AdaptiveTokenizerConfig.from_json(text.replace(*change))


@pytest.mark.parametrize("base", BASES)
def test_mutated_json(base: str) -> None:
    """Mutated JSON raises a ValueError that begins with "configuration", or gives a config that round-trips."""
    rng, text = random.Random(base), config(base).to_json()
    for _ in range(EXAMPLES // 3):
        given = mutated_json(text, rng)
        message = "configuration"
        with memory(seconds=1):
            try:
                found = AdaptiveTokenizerConfig.from_json(given)
                assert AdaptiveTokenizerConfig.from_json(found.to_json()) == found
            except ValueError as error:
                message = str(error)
        assert message.startswith("configuration") and len(message) < 1000


EARLIER = Path(__file__).parents[1] / "data"


def test_names_of_before_are_read() -> None:
    """Earlier names of fields, in a model file and a run's configuration, are read; today's names are written."""
    text = (EARLIER / "earlier_model.json").read_text()
    config = AdaptiveTokenizerConfig.from_json(text)
    assert "small_code_initialisation" in text and not config.quirks.small_code_initialization
    assert config.base.kind == "vae" and "initialisation" not in config.to_json()
    one = AdaptiveTokenizerConfig.from_json(text.replace('"quantized"', '"unfactorised"'))
    assert one.bottleneck == "unfactorized"
    assert TrainingConfig.from_mapping({"data": "initialisation"}).data == "initialisation"
    run = TrainingConfig.read(EARLIER / "earlier_run.json")
    assert (run.initialization, run.regularizer, run.steps) == ("published", 0.1, 2)
    assert run.differences(json.loads((EARLIER / "earlier_run.json").read_text())) == []
    both = text.replace('"small_code_ini', '"small_code_initialization": true, "small_code_ini')
    with pytest.raises(ValueError, match="small_code_initialization is there twice"):
        AdaptiveTokenizerConfig.from_json(both)
