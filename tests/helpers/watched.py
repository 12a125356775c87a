"""Record the calls of functions without changing them."""

from __future__ import annotations

from typing import Any

import pytest


def watched(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """List that grows with each later call of ``place.name`` by its arguments, (*args, options)."""
    calls: list[Any] = []
    function = getattr(place, name)

    def seen(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        return function(*args, **options)

    monkeypatch.setattr(place, name, seen)
    return calls
