"""``run.json`` of a checkpoint: the state of a run beside its tensors, with a checksum of itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..atomic_files import reading

NAME = "run.json"
#: Most bytes of the file.
LARGEST = 2_000_000


def stated(content: Mapping[str, Any]) -> str:
    """Text of the file, with the checksum of its content.

    Raises:
        ValueError: it would be too large to be read.
    """
    text = json.dumps({"checksum": checksum(content), **content})
    if len(text) > LARGEST:
        raise ValueError(f"{NAME}: expected at most {LARGEST} bytes, got {len(text)}")
    return text


def checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint's ``run.json``; the type of each field is checked.

    Raises:
        OSError: no such file.
        ValueError, RecursionError: another file, or a damaged one.
    """
    with reading(checkpoint / NAME) as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"expected at most {LARGEST} bytes")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected fields by name, got {type(content).__name__}")
    found = content.pop("checksum", None)
    if found != checksum(content):
        raise ValueError("it differs from its checksum, or has none")
    content = {"config": {}, "model": {}, "seconds": 0.0, **content}
    for name, good in _KINDS.items():
        if name not in content or not good(content[name]):
            raise ValueError(f"{name} is missing or of another kind")
    return content


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_list_of_files(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) < 100_000
        and all(isinstance(x, list) and len(x) == 2 and all(map(_is_count, x)) for x in value)
    )


#: Checks of the fields.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "config": lambda value: isinstance(value, dict),
    "model": lambda value: isinstance(value, dict),
    "seconds": lambda value: type(value) in (int, float) and 0 <= value < 1e12,
    "files": _is_list_of_files,
    "data": lambda value: isinstance(value, list),
}
