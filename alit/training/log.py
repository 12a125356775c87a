"""Logs of a run: ``log.jsonl``, TensorBoard files."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import replacing


class NotFinite(ValueError):
    """Exception: a term of the loss, or a tensor that a checkpoint would hold, is NaN or infinite."""


def reason(error: Exception) -> str:
    """First line of an error's message, or the name of its class."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Terms:
    """Loss terms of the steps since they were last fetched, kept on the device: a step waits for nothing."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._values: dict[str, list[float]] = {}

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        self._steps.append((step, tuple(terms), torch.stack([x.float() for x in terms.values()])))

    def check(self) -> None:
        """Fetch the terms and check that they are finite.

        Raises:
            NotFinite: names the first step and the first term of it that is not finite, parts before their sum.
        """
        for step, names, row in self._steps:
            numbers = dict(zip(names, row.tolist(), strict=True))
            bad = [name for name, number in numbers.items() if not math.isfinite(number)]
            if bad:
                first = next((name for name in bad if name != "loss"), "loss")
                raise NotFinite(f"loss: not finite at step {step}: {first} is {numbers[first]}")
            for name, number in numbers.items():
                self._values.setdefault(name, []).append(number)
        self._steps.clear()

    def means(self) -> dict[str, float]:
        """Mean of each term over the steps since the last call."""
        self.check()
        means = {name: sum(x) / len(x) for name, x in self._values.items()}
        self._values.clear()
        return means


class Log:
    """Writer of ``log.jsonl`` and, if wanted, of TensorBoard files in ``tensorboard`` (by ``writer``, else None).

    Args:
        run: folder of the run.
        step: step at which the run goes on; lines beyond it are dropped.

    Raises:
        ValueError: TensorBoard is wanted and not installed.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool) -> None:
        path = run / "log.jsonl"
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        kept = [line for line in text.split("\n") if 0 <= _step(line) <= step]
        with replacing(path) as file:
            file.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ValueError(
                    "tensorboard: not installed: pip install 'alit[train]', or tensorboard: false"
                ) from error
            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, float]) -> None:
        """Append a line, and its values to TensorBoard files.

        Raises:
            OSError: it could not be written; the message names the file.
        """
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.file.name}: could not be written ({error})") from error
        if self.writer is not None:
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been reported
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def _step(line: str) -> int:
    """Step of a line of the log; -1 for one that was cut short or is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return -1
