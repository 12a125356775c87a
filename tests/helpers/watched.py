"""Functions that compute as ever, and whose calls are seen."""

from __future__ import annotations

from typing import Any

import pytest


def watched(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """Arguments of the calls of a function of a module, from now on: the list grows with each."""
    calls: list[Any] = []
    function = getattr(place, name)

    def seen(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        return function(*args, **options)

    monkeypatch.setattr(place, name, seen)
    return calls
