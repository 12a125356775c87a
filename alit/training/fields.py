"""Fields of a configuration: from text to plain values, from plain values to a field's type, within a range.

YAML is read without anchors, tags or interpolation: what a text says is what it spells out.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

#: Most characters of a configuration file, and of one value.
LARGEST_TEXT, LARGEST_VALUE = 64_000, 10_000
#: Deepest nesting of values, and most values in one.
DEEPEST, MOST_VALUES = 20, 10_000

#: Intervals of the numbers in :class:`alit.training.TrainingConfig`. Every field of numbers has one.
LIMITS = {
    "steps": "[0, 1e9]",
    **dict.fromkeys(("log_every", "image_every", "checkpoint_every"), "[1, 1e9]"),
    **dict.fromkeys(("batch_size", "accumulate", "shuffle_buffer", "keep"), "[1, 1e6]"),
    **dict.fromkeys(("learning_rate", "discriminator_learning_rate"), "(0, inf)"),
    **dict.fromkeys(("warmup", "ema", "betas"), "[0, 1)"),
    **dict.fromkeys(
        ("perceptual_weight", "l2_weight", "ssim_weight", "code_weight", "base_weight"), "[0, inf)"
    ),
    **dict.fromkeys(("regularizer", "gan_schedule", "weight_decay"), "[0, inf)"),
    **dict.fromkeys(("clip", "seconds", "max_megapixels"), "(0, inf)"),
    "crop": "(0, 1]",
    "tail_drop": "[0, 1]",
    "iterations_per_step": "[1, 1e6]",
    "first_only": "[0, 0.75)",
    "seed": "[0, 1e18]",
    "workers": "[0, 1024]",
}

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.ASCII
)


def read(text: str) -> Any:
    """Value of a YAML text (version 1.2, and so of JSON): None, bool, int, float, str, lists, dictionaries.

    Raises:
        ValueError: not YAML; anchors, tags, names that come twice; too large or too deep.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError("configurations need PyYAML: pip install 'alit[train]'") from error
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"expected at most {LARGEST_TEXT} characters, got {len(text)}")
    try:
        return _built(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())[:500]})") from error


def _built(events: Any) -> Any:
    """Value of the YAML events of one document; containers that are not closed yet lie on a stack."""
    from yaml import events as kinds

    top: list[Any] = []
    stack: list[tuple[Any, list[Any]]] = [(kinds.StreamStartEvent(), top)]
    for event in events:
        if getattr(event, "anchor", None):
            raise ValueError("expected plain values, got anchors, aliases")
        if getattr(event, "tag", None):
            raise ValueError(f"expected plain values, got tag {event.tag!r}")
        if isinstance(event, kinds.ScalarEvent):
            stack[-1][1].append(_scalar(event.value) if event.style is None else event.value)
        elif isinstance(event, kinds.MappingStartEvent | kinds.SequenceStartEvent):
            if len(stack) > DEEPEST:
                raise ValueError(f"expected values at most {DEEPEST} deep")
            stack.append((event, []))
        elif isinstance(event, kinds.MappingEndEvent | kinds.SequenceEndEvent):
            start, items = stack.pop()
            is_mapping = isinstance(start, kinds.MappingStartEvent)
            stack[-1][1].append(_mapping(items) if is_mapping else items)
    if len(top) > 1:
        raise ValueError("expected one document, got several")
    return top[0] if top else None


def _mapping(items: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(name, str):
            raise ValueError(f"expected names of fields, got {reprlib.repr(name)}")
        if name in found:
            raise ValueError(f"{name[:200]!r} is there twice")
        found[name] = value
    return found


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        if len(text) > 20:
            raise ValueError(f"expected numbers of at most 19 digits, got {text[:30]}...")
        return int(text)
    if len(text) < 100 and _NUMBER.fullmatch(text.lower()):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Values by name from texts ``name=value``, in YAML; ``model.name=value`` is a value within a dictionary.

    Raises:
        ValueError: a text of another form, or a value that is not YAML.
    """
    found: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected name=value, got {text!r}")
        *outer, last = path.split(".")
        within = found
        if len(outer) > DEEPEST:
            raise ValueError(f"--set: expected values at most {DEEPEST} deep")
        for name in outer:
            within = within.setdefault(name, {})
            if not isinstance(within, dict):
                raise ValueError(f"--set: {name} is a value and has values, in {text[:200]!r}")
        try:
            within[last] = read(value)
        except ValueError as error:
            raise ValueError(f"--set: {path[:200]}: {error}") from error
    return found


def converted(name: str, kind: Any, value: Any) -> Any:
    """Convert a plain value to the type of a field.

    Args:
        kind: of str, int, float, bool, tuples of these, None, or a dictionary of plain values.

    Raises:
        ValueError: a value of another type or beyond ``LIMITS``; NaN and infinity pass.
    """
    kinds = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in kinds:
            return None
        kind = next(x for x in kinds if x is not types.NoneType)
        kinds = typing.get_args(kind)
    if kind in (int, float):
        return _number(name, kind, value)
    if typing.get_origin(kind) is tuple:
        expect(name, isinstance(value, list | tuple), "a list", value)
        count = len(value) if kinds[-1] is Ellipsis else len(kinds)
        expect(name, len(value) == count <= 1000, f"{min(count, 1000)} values", value)
        return tuple(converted(name, kinds[0], x) for x in value)
    if typing.get_origin(kind) is dict:
        expect(name, isinstance(value, Mapping), "options by name", value)
        return _plain(name, value, DEEPEST, [MOST_VALUES])
    if kind is bool:
        if isinstance(value, str):
            value = _SWITCHES.get(value.lower(), value)
        expect(name, isinstance(value, bool), "true or false", value)
        return value
    if type(value) is int or isinstance(value, os.PathLike):
        value = str(value)
    return _text(name, value)


def _number(name: str, kind: type, value: Any) -> Any:
    if isinstance(value, str):
        value = _scalar(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        return value
    good = type(value) is int or (kind is float and type(value) is float)
    limits = LIMITS[name]
    expected = f"{'an integer' if kind is int else 'a number'} in {limits}"
    largest = sys.float_info.max if kind is float else 2**63
    expect(name, good and abs(value) <= largest and within(value, limits), expected, value)
    return kind(value)


def within(value: float, limits: str) -> bool:
    """True if a number is in an interval such as ``(0, 1]``."""
    low, high = map(float, limits[1:-1].split(","))
    above = value >= low if limits[0] == "[" else value > low
    return above and (value <= high if limits[-1] == "]" else value < high)


def _plain(name: str, value: Any, depth: int, left: list[int]) -> Any:
    """Copy of nested plain values, as JSON has them; ``left`` counts down the values that are still allowed."""
    left[0] -= 1
    expect(name, depth >= 0 and left[0] >= 0, f"{MOST_VALUES} values, {DEEPEST} deep", "more")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            _text(name, key)
        return {str(k): _plain(f"{name}.{k}", v, depth - 1, left) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, x, depth - 1, left) for x in value]
    if isinstance(value, str):
        return _text(name, value)
    good = value is None or type(value) in (bool, int, float)
    expect(name, good, "text, a number, true, false, a list or options by name", value)
    if value is not None:
        expect(name, abs(value) < 2**63, "a finite number", value)
    return value


def _text(name: str, value: Any) -> str:
    good = isinstance(value, str) and len(value) <= LARGEST_VALUE and "\0" not in value
    # Bytes of a path that are not UTF-8 come as surrogates from U+DC80 to U+DCFF.
    good = good and not any(
        "\ud800" <= x <= "\udfff" and not "\udc80" <= x <= "\udcff" for x in value
    )
    expect(name, good, f"text of at most {LARGEST_VALUE} characters", value)
    return str(value)


def expect(name: str, good: bool, expected: str, got: Any) -> None:
    """Raise ``ValueError`` about a field unless it is ``good``."""
    if not good:
        raise ValueError(f"{name[:200]}: expected {expected}, got {reprlib.repr(got)}")
