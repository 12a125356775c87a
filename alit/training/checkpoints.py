"""Checkpoints of runs: folders written by ``torch.distributed.checkpoint``, moved into place when complete."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from ..checkpoint import CheckpointError
from .processes import Processes

PREFIX = "checkpoint-"


def saved(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(
        x for x in run.glob(f"{PREFIX}*") if x.is_dir() and x.name[len(PREFIX) :].isdigit()
    )


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
    """Write a checkpoint, whole or not at all, and drop all but the newest ``keep``.

    Args:
        tensors: the same names in every process; sharded tensors are written by all.
        about: what the first process writes beside them.
        own_data: where this process's data stands.

    Raises:
        OSError: it could not be written; the checkpoints before it are intact.
    """
    target, part = run / f"{PREFIX}{step:08d}", run / f".{PREFIX}{step:08d}.part"
    try:
        if own.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        own.barrier()
        with _alone_without_warning():
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(part), no_dist=own.count == 1)
        (part / f"data-{own.rank}.json").write_text(json.dumps(own_data))
        if own.first:
            (part / "run.json").write_text(json.dumps({**about, "step": step}, indent=1))
        own.barrier()
        if own.first:
            if target.exists():  # the same step again, after a resumed run was interrupted at once
                shutil.rmtree(target)
            part.rename(target)
            for old in saved(run)[:-keep]:
                shutil.rmtree(old)
        own.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:
        if own.first:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"{target}: could not be written ({_reason(error)}); the checkpoints before it are intact"
        ) from error
    return target


def _reason(error: BaseException) -> str:
    """One line; the library wraps what happened in each process."""
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    return (str(error) or type(error).__name__).splitlines()[0]


def about(checkpoint: Path) -> dict[str, Any]:
    """What was written beside the tensors.

    Raises:
        alit.CheckpointError: no checkpoint, or a damaged one.
    """
    try:
        return json.loads((checkpoint / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint}: not a checkpoint of a run ({error})") from error


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """torch warns where one process saves for itself, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def load(checkpoint: Path, tensors: dict[str, Tensor], own: Processes) -> dict[str, Any] | None:
    """Fill the tensors in place; returns where this process's data stood.

    Raises:
        alit.CheckpointError: a damaged checkpoint, or one of other tensors.
        ValueError: another number of processes, with data of which each has its own stream.
    """
    try:
        with _alone_without_warning():
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=own.count == 1)
        before = len(list(checkpoint.glob("data-*.json")))
        file = checkpoint / f"data-{own.rank if before == own.count else 0}.json"
        data = json.loads(file.read_text())
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise CheckpointError(f"{checkpoint}: could not be read ({_reason(error)})") from error
    if data is not None and before != own.count:
        raise ValueError(f"processes: expected {before}, as the run began with, got {own.count}")
    return data
