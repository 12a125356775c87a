"""Training configurations from YAML and Python: types and limits of every field, and hostile values."""

from __future__ import annotations

import json
import math
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from alit.training import TrainingConfig, train
from alit.training.fields import LIMITS, assignments, read, within
from tests.helpers.hostile import EXAMPLES, memory, mutated

KINDS = {name: str(kind) for name, kind in get_type_hints(TrainingConfig).items()}
INTEGERS = [name for name, kind in KINDS.items() if kind in ("<class 'int'>", "int | None")]
FLOATS = [name for name, kind in KINDS.items() if "float" in kind]
SWITCHES = [name for name, kind in KINDS.items() if kind == "<class 'bool'>"]
TEXTS = [name for name, kind in KINDS.items() if kind in ("<class 'str'>", "str | None")]


def shaped(name: str, value: Any) -> Any:
    """``value`` in the structure of the field ``name``: a number, or a list of numbers."""
    return {"betas": [value, value], "gan_schedule": [[0.5, value]]}.get(name, value)


def test_configuration_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "steps: 5\nlearning_rate: 1e-3\nmodel: {size: tiny, base: dct}\nbetas: [0.8, 0.9]\n"
        "flip: off\nperceptual: off\nstage: 2\n"
    )
    config = TrainingConfig.read(path, batch_size=2, seed=None)
    assert (config.steps, config.learning_rate, config.batch_size, config.seed) == (5, 1e-3, 2, 0)
    assert config.betas == (0.8, 0.9) and config.model == {"size": "tiny", "base": "dct"}
    assert (config.flip, config.perceptual, config.stage) == (False, "off", "2")
    path.write_text(json.dumps(config.asdict()))
    assert TrainingConfig.read(path) == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepps: 5", "no field 'stepps'; did you mean 'steps'"),
        ("steps: many", r"steps: expected an integer in \[0, 1e9\], got 'many'"),
        ("parallel: dp", "parallel: expected one of ddp, fsdp, got 'dp'"),
        ("model: nano", "model: expected options by name"),
        ("gan_schedule: [[0.5, 0.1], [0.1, 0.2]]", "gan_schedule: expected rising fractions"),
        ("- 1", "expected fields by name"),
        ("", "expected fields by name, got None"),
        ("a: [", "not a configuration in YAML"),
        ("\udcff\0", "not a configuration in YAML"),  # a byte that is no text
        ("steps: 1\nsteps: 2", "'steps' is there twice"),
        ("model: {a: 1, a: 2}", "'a' is there twice"),
        ("model: &x {a: *x}", "anchors, aliases"),
        ("model: {a: &x [1], b: *x}", "anchors, aliases"),
        ("data: !!python/object/apply:os.system ['true']", "got tag"),
        ("data: !!binary aGVsbG8=", "got tag"),
        ("model: !x {}", "got tag"),
        ("steps: " + "9" * 10_000, "numbers of at most 19 digits"),
        ("model: " + "[" * 10_000, "at most 20 deep"),
        ("model: " + "{a: " * 10_000, "at most 20 deep"),
        ("model: {1: 2}", "expected names of fields, got 1"),
        ("model: {[1]: 2}", "expected names of fields"),
        ("steps: 1\n---\nsteps: 2", "one document"),
        ("#" * 100_000, "at most 64000 characters"),
        ("start_from: a\nbase_from: b", "base_from: expected None where start_from"),
        ("stage: 3", "stage: expected one of base, 1, 2"),
        ("perceptual: vgg", "perceptual: expected one of lpips, efficientnet, off, got 'vgg'"),
        ("discriminators: two", "discriminators: expected one of each, shared"),
        ("gan_schedule: 0.5", "gan_schedule: expected a list"),
        ("gan_schedule: [[2, 0.1]]", "gan_schedule: expected rising fractions"),
        ("cuda_graph: true\nstage: 2", "stage: expected '1' with cuda_graph"),
        ("cuda_graph: true\niterations_per_step: 2", "iterations_per_step: expected None with cu"),
    ],
)
def test_configurations_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, errors="surrogateescape")
    with memory() as used, pytest.raises(ValueError, match=message):
        TrainingConfig.read(path)
    assert used.taken < 50 << 20


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", FLOATS)
def test_no_run_begins_with_numbers_that_are_not_finite(
    name: str, value: float, tmp_path: Path
) -> None:
    config = TrainingConfig(output=str(tmp_path / "run"), **{name: shaped(name, value)})
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number in .*, got "):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", INTEGERS + FLOATS)
def test_numbers_keep_to_their_limits(name: str) -> None:
    """Every numeric field, later ones included, refuses booleans, text and values outside its limits."""
    low, high = map(float, LIMITS[name][1:-1].split(","))
    wrong: list[Any] = [10**400, True, False, "x", [], {}, b"1", 1j, -1, low - 1]
    wrong += [high * 2 + 1] if math.isfinite(high) else []
    wrong += [x for x in (low, high) if math.isfinite(x) and not within(x, LIMITS[name])]
    wrong += [1.5, 2.0] if name in INTEGERS else []
    wrong += [math.nan, math.inf] if name in INTEGERS else []
    wrong += [] if "None" in KINDS[name] else [None]
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
            TrainingConfig(**{name: shaped(name, value)})
    middle = max(low, 1) if name in INTEGERS else (low + min(high, 1)) / 2
    middle = int(middle) if name in INTEGERS else middle
    kept = getattr(TrainingConfig(**{name: shaped(name, middle)}), name)
    assert json.dumps(kept) == json.dumps(shaped(name, middle))


def test_large_numbers_and_paths_of_any_bytes() -> None:
    config = TrainingConfig(learning_rate=1e30, weight_decay=1e300, data="D\udcff")
    assert (config.learning_rate, config.weight_decay) == (1e30, 1e300)
    assert TrainingConfig.from_mapping(config.asdict()) == config
    assert read(json.dumps(config.asdict()))["data"] == "D\udcff"


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_booleans(name: str) -> None:
    for value in (0, 1, 0.0, None, "maybe", [], "1"):
        with pytest.raises(ValueError, match=f"^{name}: expected true or false, got "):
            TrainingConfig(**{name: value})
    assert getattr(TrainingConfig(**{name: "on"}), name) is True


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_text(name: str) -> None:
    wrong: list[Any] = [True, 1.5, [], {}, b"x", "a\0b", "\ud800", "x" * 100_000]
    for value in wrong + ([] if "None" in KINDS[name] else [None]):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            TrainingConfig(**{name: value})


def test_every_field_has_a_kind_of_its_own() -> None:
    assert {*INTEGERS, *FLOATS, *SWITCHES, *TEXTS, "model", "generator"} == KINDS.keys()
    assert LIMITS.keys() == {*INTEGERS, *FLOATS}


def test_options_of_the_model_are_plain_and_bounded() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    wide = [0] * 100_000
    for value in (cyclic, deep, wide, math.nan, 2**70, object(), {1: 2}, {b"": 1}, b"x", "\0"):
        with pytest.raises(ValueError, match=r"^model.*: expected "):
            TrainingConfig(model={"a": value})


@pytest.mark.parametrize("name", ["data", "output", "start_from", "base_from", "device", "model"])
@pytest.mark.parametrize("how", ["file", "mapping", "set"])
def test_nothing_is_interpolated(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    for text in ("${oc.env:SECRET}", "${SECRET}", "$SECRET", "~/x", "${steps}", "${oc.env:NO}"):
        value: Any = {"size": text} if name == "model" else text
        if how == "file":
            (tmp_path / "x.yaml").write_text(json.dumps({name: value}))
            config = TrainingConfig.read(tmp_path / "x.yaml")
        elif how == "mapping":
            config = TrainingConfig.from_mapping({name: value})
        else:
            path = "model.size" if name == "model" else name
            config = TrainingConfig.from_mapping(assignments([f"{path}={json.dumps(text)}"]))
        assert getattr(config, name) == value and "swordfish" not in json.dumps(config.asdict())


def test_assignments() -> None:
    given = ["model.code_dim=8", "steps=5", "model.encoder.width=64", "gan_schedule=[]", "data=a=b"]
    expected = {"code_dim": 8, "encoder": {"width": 64}}
    assert assignments(given) == {"model": expected, "steps": 5, "gan_schedule": [], "data": "a=b"}
    for texts, message in (
        (["steps"], "--set: expected name=value, got 'steps'"),
        (["steps=1", "steps.x=2"], "--set: steps is a value and has values"),
        (["steps=["], "--set: steps: not YAML"),
        ([".".join("a" * 50) + "=1"], "--set: expected values at most 20 deep"),
    ):
        with pytest.raises(ValueError, match=message):
            assignments(texts)


# Damaged and hostile configurations.

WORDS = (
    *("[", "]", "{", "}", ": ", "- ", "\n", "\n  ", ", ", "#", "'", '"', "\\", "|\n ", ">\n", "? "),
    *("&a ", "*a", "!!python/name:os.system ", "<<: ", "---\n", "...\n", "%YAML 1.1\n", "\t", "\r"),
    *("1e999", "-1", "0x10", "1_0", "1:30", ".nan", "null", "true", "2001-01-01", "${a}", "\ufeff"),
    *("\x85", "\u2028", "\x07", "9" * 400, "a" * 300),
)
VALUES = (
    *(None, True, 0, -1, 1, 2**63, 10**400, 1.5, math.nan, math.inf, -0.0, "", "x", "1e5", "off"),
    *(
        [],
        {},
        (),
        [[]],
        [[0, 1]],
        [None],
        {"a": {"b": [1]}},
        {1: 2},
        {None: 1},
        b"x",
        object(),
        int,
    ),
    *("${oc.env:HOME}", "\0", "\udfff", "9" * 5000, [0] * 2000, {"size": "nano"}, {1, 2}, 1j),
)


def hostile_text(chance: random.Random, names: list[str]) -> bytes:
    good = {name: TrainingConfig().asdict()[name] for name in chance.sample(names, 5)}
    if chance.random() < 0.5:
        return mutated(json.dumps(good, indent=chance.choice((None, 1))).encode(), chance)
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in good.items())
    for _ in range(chance.choice((1, 2, 8, 50))):
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(WORDS) * chance.choice((1, 1, 1, 40)) + text[at:]
    return text.encode()


def test_whatever_comes_is_a_configuration_or_a_value_error(tmp_path: Path) -> None:
    chance, path, names = random.Random(0), tmp_path / "x.yaml", list(KINDS)
    slowest, accepted = 0.0, 0
    with memory() as used:
        for number in range(EXAMPLES):
            start = time.monotonic()
            try:
                match number % 3:
                    case 0:
                        path.write_bytes(hostile_text(chance, names))
                        config = TrainingConfig.read(path)
                    case 1:
                        chosen = chance.sample(names, chance.choice((1, 1, 2)))
                        fields = {name: chance.choice(VALUES) for name in chosen}
                        config = TrainingConfig.from_mapping(fields)
                    case _:
                        texts = hostile_text(chance, names).decode(errors="surrogateescape")
                        value = chance.choice((texts, chance.choice(WORDS), chance.choice(WORDS)))
                        given = assignments([f"{chance.choice(names)}={value}"])
                        config = TrainingConfig.from_mapping(given)
                config.check_finite()
                accepted += 1
                assert TrainingConfig.from_mapping(config.asdict()) == config
            except (ValueError, OSError):
                pass
            slowest = max(slowest, time.monotonic() - start)
    assert used.taken < 100 << 20 and slowest < 5
    assert accepted > EXAMPLES / 50


LARGE = (
    *("[" * 60_000, "- " * 30_000, "? " * 30_000, "{a: " * 15_000, "a: " * 20_000, "'" * 60_000),
    *("\n" * 60_000, "x\n" * 30_000, "!" * 60_000, "%x\n" * 20_000, "1," * 30_000, "&a " * 20_000),
    *("[" + "{a: 1}, " * 7_000 + "]", "1:" * 30_000, "|\n" + " " * 60_000, "9" * 60_000),
)


@pytest.mark.parametrize("number", range(len(LARGE)))
def test_large_texts_take_seconds_at_most(number: int) -> None:
    start = time.monotonic()
    with memory() as used, suppress(ValueError):
        read(LARGE[number])
    assert time.monotonic() - start < 10 and used.taken < 100 << 20
