"""JSON with hostile values in it, for the readers of configurations and headers."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: Values put in the place of those that a reader expects; RAW: JSON text that Python would not write.
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 5000,
    "1" * 5000,
    '{"a":1,"a":2}',
    '"\\ud800"',
)
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 2**16, 10**6, 10**9, 10**12, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)),
    *(
        0.0,
        -0.0,
        0.5,
        1.0,
        8.0,
        1e-320,
        1e308,
        True,
        False,
        None,
        "",
        "8",
        "NaN",
        "x" * 10_000,
        "\n\x1b[31m",
    ),
    *([], [[]], {}, {"a": {}}, [1] * 1000, [10**9] * 3, [1, "2"], [10**5] * 10**4, ["a"], [None]),
)


def mutated_json(text: str, rng: random.Random) -> str:
    """JSON ``text`` with one to three of its values replaced, removed, copied, or moved to another key."""
    whole = [json.loads(text)]
    marks: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(_places(whole))
        match rng.randrange(6):
            case 0:
                del holder[key]
                if not whole:
                    return ""
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("new", "kind", "", "x" * 5000, "\x00", "ü"))] = holder.pop(key)
            case 2:
                mark = f"<{len(marks)}>"
                marks[mark], holder[key] = rng.choice(RAW), mark
            case 3:
                other, name = rng.choice(_places(whole))
                holder[key] = copy.deepcopy(other[name])
            case 4 if isinstance(holder[key], int):
                holder[key] += rng.choice((-1, 1, 32, -(holder[key] // 2), holder[key]))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    result = json.dumps(whole[0])
    for mark, raw in marks.items():
        result = result.replace(json.dumps(mark), raw)
    return result


def _places(whole: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value in nested lists and dicts."""
    found: list[tuple[Any, Any]] = []
    rest = [whole]
    while rest:
        holder = rest.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list) and len(holder[key]) < 500:
                rest.append(holder[key])
    return found
