"""Checkpoints of runs: folders of safetensors files and one of JSON, moved into place when complete.

Nothing that they hold is executed. Each process writes the tensors, or the rows of tensors, that it alone has, so that
any number of processes can read them again.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..atomic_files import reading, sync
from ..checks import CheckpointError
from ..model_file import MAX_HEADER
from . import run_json
from .log import reason
from .processes import Processes
from .rows import fill, is_sharded, rows_of, shape_of

PREFIX = "checkpoint-"


def saved(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; one that was put aside counts until its replacement is in place."""
    found = {}
    for path in (*run.glob(f".{PREFIX}*.aside"), *run.glob(f"{PREFIX}*")):
        name = path.name.removeprefix(".").removesuffix(".aside")
        if path.is_dir() and (step := _step(name)) is not None:
            found[step] = path
    return [found[step] for step in sorted(found)]


def _step(name: str) -> int | None:
    match = re.fullmatch(rf"{PREFIX}(\d{{8,18}})", name, re.ASCII)
    return int(match[1]) if match else None


def recover(run: Path) -> None:
    """Finish or undo what a killed run left half done; the caller must hold the run's lock (``alone``)."""
    for aside in run.glob(f".{PREFIX}*.aside"):
        place = run / aside.name[1:].removesuffix(".aside")
        if place.exists():
            _remove(aside)
        else:
            aside.rename(place)
    for part in run.glob(f".{PREFIX}*.part"):
        _remove(part)


def _remove(path: Path) -> None:
    """Remove a folder, or whatever else is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def drop(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill leaves no half of it under its name."""
    part = checkpoint.with_name(f".{checkpoint.name}.part")
    checkpoint.rename(part)
    shutil.rmtree(part)


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    own_data: Mapping[str, Any] | None,
    own: Processes,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, whole or not at all, and drop all but the newest ``keep``; every process calls it.

    Once the first checkpoint is on the disk, there is an intact one at every moment.

    Args:
        tensors: the same names in every process; each writes its rows of sharded tensors, rank 0 all other tensors.
        about: values of ``run.json``, ``config`` and ``model`` among them.
        own_data: position of this process's data; None where the step says it all.

    Raises:
        OSError: it could not be written; the checkpoints before it are intact.
    """
    target, part = run / f"{PREFIX}{step:08d}", run / f".{PREFIX}{step:08d}.part"
    file = part / _file(own.rank)

    def clear() -> None:
        if own.first:
            if part.exists():
                _remove(part)
            part.mkdir(parents=True)

    def write() -> tuple[int, int]:
        rows = {name: rows_of(x)[0] for name, x in tensors.items() if own.first or is_sharded(x)}
        held = {name: x.cpu().contiguous() for name, x in rows.items()}
        safetensors.torch.save_file(held, file)
        _flush(file)
        return file.stat().st_size, _checksum(file)

    def place() -> None:
        if own.first:
            content = {**about, "step": step, "files": files, "data": data}
            (part / run_json.NAME).write_text(run_json.stated(content))
            _flush(part / run_json.NAME)
            sync(part)
            _move(part, target)
            for old in saved(run)[:-keep]:
                drop(old)

    try:
        _in_all(own, clear)
        files = own.gather(_in_all(own, write))
        data = own.gather(own_data)
        _in_all(own, place)
    except OSError as error:
        if own.first:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"{target}: could not be written ({error}); the checkpoints before it are intact"
        ) from error
    return target


def _in_all(own: Processes, action: Callable[[], Any], kind: type[Exception] = OSError) -> Any:
    """Run ``action`` in all processes and return its result; if it fails in one, all raise ``kind`` with its reason."""
    result, cause = None, None
    try:
        result = action()
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        cause = error
    failures = own.gather(cause and reason(cause))
    if any(failures):
        raise kind(next(filter(None, failures))) from cause
    return result


def _move(part: Path, target: Path) -> None:
    """Give a complete folder its final name; a folder of that name is put aside first (see :func:`recover`)."""
    aside = target.with_name(f".{target.name}.aside")
    if target.exists():
        target.rename(aside)
    part.rename(target)
    sync(target.parent)
    if aside.exists():
        _remove(aside)


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file)


def _file(rank: int) -> str:
    return f"tensors-{rank:05d}.safetensors"


def _checksum(path: Path) -> int:
    total = 0
    with reading(path) as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def about(checkpoint: Path) -> dict[str, Any]:
    """Values written beside the tensors: ``step``, ``config``, ``model``, ``seconds``, ``files``, ``data``.

    Raises:
        alit.CheckpointError: no checkpoint, or a damaged one.
    """
    try:
        content = run_json.read(checkpoint)
        if _step(checkpoint.name) not in (None, content["step"]):
            raise ValueError(f"it is of step {content['step']}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of a run, or damaged ({run_json.NAME}: {error})"
        ) from error
    return content


def damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint; None where all its files are as they were written."""
    try:
        for rank, stated in enumerate(about(checkpoint)["files"]):
            file = checkpoint / _file(rank)
            if [file.stat().st_size, _checksum(file)] != stated:
                return f"{checkpoint}: damaged ({file.name} is not as written)"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{checkpoint}: could not be read ({error})"
    return None


@contextmanager
def _holders(checkpoint: Path, count: int) -> Iterator[dict[str, list[Any]]]:
    """Context manager: open files that hold each tensor, by its name; read errors within are ``CheckpointError``."""
    try:
        with ExitStack() as stack:
            holders: dict[str, list[Any]] = {}
            for rank in range(count):
                path = checkpoint / _file(rank)
                with reading(path) as opened:
                    if int.from_bytes(opened.read(8), "little") > MAX_HEADER:
                        raise ValueError(f"{path.name}: no safetensors file")
                file = stack.enter_context(safetensors.safe_open(path, "pt"))
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    holders.setdefault(name, []).append(file)
            yield holders
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: could not be read ({reason(error)})") from error


def shapes(checkpoint: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors named ``part/...``, by name without that prefix.

    Raises:
        alit.CheckpointError: a damaged checkpoint.
    """
    prefix = f"{part}/"
    with _holders(checkpoint, len(about(checkpoint)["files"])) as holders:
        own = [name for name in holders if name.startswith(prefix)]
        return {x.removeprefix(prefix): shape_of(x, holders[x]) or () for x in own}


@torch.no_grad()
def load(checkpoint: Path, tensors: Mapping[str, Tensor], own: Processes) -> list[Any] | None:
    """Fill the tensors in place; an error in one process is raised in all.

    Returns:
        Position of the data of each process; None where the step says it all.

    Raises:
        alit.CheckpointError: a damaged checkpoint, or one of other tensors.
    """
    content = about(checkpoint)

    def read() -> None:
        with _holders(checkpoint, len(content["files"])) as holders:
            for name, tensor in tensors.items():
                fill(name, tensor, holders.get(name, []))

    _in_all(own, read, CheckpointError)
    return None if all(x is None for x in content["data"]) else content["data"]
