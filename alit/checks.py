"""Checks of the type and range of fields from files and callers, and of the JSON objects that hold them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import reprlib
import sys
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

#: Most characters of a configuration in JSON; those of real models have a twentieth of that.
MAX_JSON = 2**16


class CheckpointError(ValueError):
    """A file that is not a checkpoint, is damaged, or does not fit the model."""


def parse(text: str) -> Any:
    """Content of a JSON text; an object with a duplicate field, NaN and infinity are refused.

    Raises:
        ValueError: not JSON, or more than 65,536 characters of it.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"configuration: expected JSON of at most {MAX_JSON} characters")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"configuration: expected JSON ({error})") from error


class Range(NamedTuple):
    """Range of an ``Annotated`` number: integers from ``low`` to ``high``, others from ``low`` and below ``high``."""

    low: float
    high: float


class Checked:
    """Base class of dataclasses that check their fields against the annotations: bool, a ``Literal``, numbers or a
    tuple of integers ``Annotated`` with a :class:`Range`, a tuple of texts, a dataclass. A list becomes a tuple; fields
    of other kinds are left alone.

    Raises:
        ValueError: a field that does not match; the message names it.
    """

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))


@functools.cache
def _kinds(checked: type) -> dict[str, Any]:
    return get_type_hints(checked, include_extras=True)


def _checked(name: str, value: Any, kind: Any) -> Any:
    limits: Any = None
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
    kinds = get_args(kind) or (kind,)
    if value is None and NoneType in kinds:
        return None
    if get_origin(kind) is Literal:
        check_choice(name, value, kinds)
    elif kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {shown(value)}")
    elif get_origin(kind) is tuple:
        texts = str in kinds
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            items = "texts" if texts else "integers"
            raise ValueError(f"{name}: expected a list of {items}, got {shown(value)}")
        for item in value:
            if not texts:
                check_number(name, item, int, *limits)
            elif not isinstance(item, str):
                raise ValueError(f"{name}: expected a text, got {shown(item)}")
        return tuple(value)
    elif any(map(dataclasses.is_dataclass, kinds)):
        if not isinstance(value, kinds):
            expected = " or ".join(x.__name__ for x in kinds)
            raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    elif limits is not None:
        check_number(name, value, int if int in kinds else float, *limits)
    return value


def check_number(
    name: str, value: Any, kind: type[int] | type[float], low: float, high: float
) -> None:
    """Check that ``value`` is an integer in [low, high], or a float in [low, high); raises ``ValueError``."""
    whole = kind is int
    good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    good = good and low <= value <= min(high, sys.float_info.max) and (whole or value < high)
    if not good:
        expected = f"an integer in [{low}, {high}]" if whole else f"a number in [{low:g}, {high:g})"
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


#: Former names of fields in files -> present ones; below, former values of a field. Both stay readable forever.
EARLIER = {
    "initialisation": "initialization",
    "picture_every": "image_every",
    "regulariser": "regularizer",
    "small_code_initialisation": "small_code_initialization",
}
EARLIER_VALUES = {("bottleneck", "unfactorised"): "unfactorized"}


def renamed(value: Any) -> Any:
    """JSON content with former names and values of fields (``EARLIER``) replaced by present ones, at every depth.

    Raises:
        ValueError: a field is there under both names.
    """
    if not isinstance(value, dict):
        return value
    fields: list[tuple[str, Any]] = []
    name: str
    for name, within in value.items():
        if isinstance(within, str):
            within = EARLIER_VALUES.get((name, within), within)
        fields.append((EARLIER.get(name, name), renamed(within)))
    return _once(fields)


def build(kind: Any, given: Any, name: str = "") -> Any:
    """Build a dataclass, and those nested in it, from a JSON object; the field ``kind`` selects the member of a union.

    Raises:
        ValueError: no object; an unknown or missing field; an error of the dataclass. Messages name the field, behind
            ``name``.
    """
    where = f"configuration: {name}." if name else "configuration: "
    if not isinstance(given, dict):
        raise ValueError(f"configuration: {name or 'all'}: expected an object, got {shown(given)}")
    if choices := {x.kind: x for x in get_args(kind)}:
        check_choice(f"{where}kind", given.get("kind"), tuple(choices))
        kind = choices[given["kind"]]
    fields = {
        x: build(part, given[x], f"{name}.{x}".lstrip("."))
        if any(map(dataclasses.is_dataclass, get_args(part) or (part,)))
        else given[x]
        for x, part in _kinds(kind).items()
        if x in given
    }
    known = {field.name: field for field in dataclasses.fields(kind)}
    for field_name in given:
        if field_name not in known:
            raise ValueError(f"{where}{printable(field_name)}: no such field")
    for field_name, field in known.items():
        if field_name not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{where}{field_name}: expected it, got none")
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of a JSON object; raises ``ValueError`` for a duplicate: readers would not agree which one counts."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{printable(name)} is there twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: object) -> str:
    """Representation of a value for a message, shortened if it is long."""
    return reprlib.repr(value)


def printable(name: str) -> str:
    """Name for a message: the first 100 characters, escaped if they are not printable."""
    short = name[:100]
    return short if short.isprintable() else ascii(short)


def some(names: Iterable[object]) -> str:
    """The first five names, and how many more there are, for a message."""
    known = [x if isinstance(x, str) else f"a key of type {type(x).__name__}" for x in names]
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return ", ".join(map(printable, known[:5])) + more


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = f"expected one of {', '.join(choices)}, got {shown(value)}"
        raise ValueError(f"{name}: {expected}{nearest(value, choices)}")


def nearest(value: object, choices: Sequence[str]) -> str:
    """End of a message that suggests the choice most like ``value``; empty if none is near."""
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
