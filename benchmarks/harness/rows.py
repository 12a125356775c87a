"""Result file that is rewritten after every row, so that a run that is cut off keeps the rows it has measured.

The next run with the same file repeats only the cases that are incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from alit.atomic_files import replacing

#: Words in the names of compiled peers; compiling takes many times as long as timing them.
COMPILED = ("compile", "FlexAttention")


def compiled(name: str) -> bool:
    return any(part in name for part in COMPILED)


class Rows:
    """Content of a result file: cases, their contenders' rows, and reasons of those without one (:func:`runs.read`).

    Args:
        path: the file, which may exist; None: nothing is written.
        about: returns the first entries of a new file; called when it is first written.
    """

    def __init__(self, path: Path | None, about: Callable[[], dict[str, Any]] = dict) -> None:
        self._path, self._about = path, about
        self.content: dict[str, Any] = {"contests": {}, "left_out": {}, "benchmarks": []}
        if path is not None and path.exists():
            self.content |= json.loads(path.read_text())

    @property
    def left_out(self) -> dict[str, dict[str, str]]:
        """Case -> contender -> the reason why it has no time."""
        return self.content["left_out"]

    def whole(self, group: str) -> bool:
        """True if every contender of a case has its row or is absent."""
        names = self.content["contests"].get(group)
        reasons = self.left_out.get(group, {})
        found = {name for name, reason in reasons.items() if reason.startswith("absent")}
        for row in self.content["benchmarks"]:
            if row["group"] == group:
                found.add(row["extra_info"]["contender"])
        return names is not None and set(names) == found

    def begin(self, group: str, names: Iterable[str]) -> None:
        """Begin a case with these contenders; drop its rows and reasons from earlier runs."""
        self.content["contests"][group] = list(names)
        self.left_out.pop(group, None)
        kept = [row for row in self.content["benchmarks"] if row["group"] != group]
        self.content["benchmarks"] = kept

    def add(self, group: str, info: dict[str, Any], seconds: Sequence[float]) -> None:
        row = {"group": group, "extra_info": info, "stats": {"data": list(seconds)}}
        self.content["benchmarks"].append(row)
        self._write()

    def leave_out(self, group: str, name: str, reason: str) -> None:
        self.left_out.setdefault(group, {})[name] = reason
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        if "machine_info" not in self.content:
            self.content |= self._about()
        with replacing(self._path) as file:
            file.write_text(json.dumps(self.content, separators=(",", ":")) + "\n")
