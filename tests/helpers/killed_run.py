"""Run ``alit train`` in a process that kills itself at a chosen moment: see test_kills.py."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from alit import model_file
from alit.cli import app
from alit.training import checkpoints, log


def half_the_tensors(save: Any, tensors: Any, path: Path) -> None:
    save(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def half_the_model(replacing: Any, path: Path) -> None:
    file = replacing(path)
    file.__enter__().write_bytes(b"x" * 1000)
    die()


def half_a_line(write: Any, file: log.Log, record: Any) -> None:
    file.file.write('{"step": 3, "lo')
    file.file.flush()


def half_a_folder(remove: Any, path: Path, **options: Any) -> None:
    next(x for x in Path(path).iterdir() if x.is_file()).unlink()


#: Moment -> owner and name of a function, the number of its call at which the process dies, and a last action instead.
#: The second call is that of the second checkpoint, when a first one exists; text is written to the log, then the
#: configuration.
MOMENTS: dict[str, tuple[Any, str, int, Callable[..., Any]]] = {
    "none": (checkpoints, "drop", 0, print),
    "tensors": (safetensors.torch, "save_file", 2, half_the_tensors),
    "model": (model_file, "replacing", 2, half_the_model),
    "before the rename": (checkpoints, "_move", 2, lambda *_: None),
    "after the rename": (checkpoints, "drop", 1, lambda *_: None),
    "between the renames": (Path, "rename", 1, lambda rename, *paths: rename(*paths)),
    "in the midst of a removal": (shutil, "rmtree", 1, half_a_folder),
    "log": (log.Log, "write", 2, half_a_line),
    "config": (Path, "write_text", 2, lambda write, path, text: write(path, text[:100])),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def command(moment: str, *arguments: str) -> None:
    """Run the command line; the process kills itself at ``moment``."""
    owner, name, turn, last = MOMENTS[moment]
    function, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == turn:
            last(function, *arguments, **options)
            die()
        return function(*arguments, **options)

    setattr(owner, name, dying)
    app(arguments)
