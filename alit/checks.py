"""Checks of fields that a file or a caller gives: their kind and range, and the objects of JSON that hold them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

#: Characters of a configuration in JSON; those of any model are a twentieth.
MAX_JSON = 2**16


def parse(text: str) -> Any:
    """What JSON says; an object with a field twice, and NaN or infinity, are none.

    Raises:
        ValueError: not JSON, or more than 65,536 characters of it.
    """
    if not isinstance(text, str) or len(text) > MAX_JSON:
        raise ValueError(f"configuration: expected JSON of at most {MAX_JSON} characters")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"configuration: expected JSON ({error})") from error


def build(kind: Any, given: Any, name: str = "") -> Any:
    """The dataclass of an object of JSON.

    Raises:
        ValueError: no object; an unknown or missing field; what the dataclass says. ``name`` stands before the field's.
    """
    where = f"configuration: {name}." if name else "configuration: "
    if not isinstance(given, dict):
        raise ValueError(f"configuration: {name or 'all'}: expected an object, got {shown(given)}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    for field_name in given:
        if field_name not in known:
            raise ValueError(f"{where}{printable(field_name)}: no such field")
    for field_name, field in known.items():
        if field_name not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}{field_name}: expected it, got none")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; where a field is there twice, readers would not agree which counts."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{printable(name)} is there twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: object) -> str:
    """A value for a message: its beginning, where it is long."""
    return reprlib.repr(value)


def printable(name: str) -> str:
    """A name for a message: as it is, or escaped; its beginning, where it is long."""
    short = name[:100]
    return short if short.isprintable() else ascii(short)


def some(names: Iterable[object]) -> str:
    """The first of some names, and how many more there are."""
    known = [x if isinstance(x, str) else f"a key of type {type(x).__name__}" for x in names]
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return ", ".join(map(printable, known[:5])) + more


def check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        wanted = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise ValueError(f"{name}: expected {wanted}, got {shown(value)}")
    if value > high:
        raise ValueError(f"{name}: expected at most {high}, got {shown(value)}")


def check_integers(config: Any, **most: int) -> None:
    """That these fields are integers from 1 to what is given."""
    for name, high in most.items():
        check_integer(name, getattr(config, name), 1, high)


def integers(name: str, values: Any, low: int, high: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{name}: expected a list of integers, got {shown(values)}")
    for value in values:
        check_integer(name, value, low, high)
    return tuple(values)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {shown(value)}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value < high or value > sys.float_info.max:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}), got {shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}{hint}")
