"""Start of a run: the lock on its folder, and the checkpoint to go on from, the same in all processes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from ..atomic_files import alone
from ..checks import CheckpointError
from . import checkpoints
from .config import TrainingConfig
from .processes import Processes


def entered(
    config: TrainingConfig,
    own: Processes,
    stack: ExitStack,
    resume: bool,
    chosen: str | None,
    allow_changes: bool,
) -> Path | None:
    """Lock the folder of a run as long as ``stack`` lasts; returns the intact checkpoint to go on from, or None.

    Args:
        chosen: its name; the newest for None, and in a worker that torchrun restarted.

    Raises:
        ValueError: another run is there, or one that is not to be resumed, or one of another configuration.
        alit.CheckpointError: a damaged checkpoint; the message names the newest intact one.
    """
    if chosen is not None and not resume:
        raise ValueError("checkpoint: expected it with resume alone")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        if config.output is None:
            raise ValueError("output: a restarted worker has no checkpoint without it, got none")
        resume, chosen = True, None
    if config.output is None:
        if resume:
            raise ValueError("resume: expected an output folder")
        return None
    output = Path(config.output)
    names: list[str] = []
    if own.first:
        output.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(alone(output))
        except BlockingIOError as error:
            raise ValueError(f"output: another run is writing to {output}") from error
        checkpoints.recover(output)
        names = [x.name for x in checkpoints.saved(output)]
    names = own.broadcast(names)
    if chosen is not None and chosen not in names:
        there = ", ".join(names) or "none"
        raise ValueError(f"checkpoint: expected one of {there} in {output}, got {chosen!r}")
    if not names:
        return None
    source = output / (chosen or names[-1])
    if not resume:
        raise ValueError(
            f"output: {output} holds a run up to {source.name}; resume it"
            f" (alit train {output}/config.json --resume), or choose another folder"
        )
    if (problem := own.broadcast(_problem(source) if own.first else None)) is not None:
        raise CheckpointError(problem)
    differences = config.differences(checkpoints.about(source)["config"])
    if differences and not allow_changes:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"resume: the configuration differs from that of {source.name}:\n  {listed}\n"
            f"go on with that of the run (alit train {output}/config.json --resume), or with this one (--allow-changes)"
        )
    return source


def _problem(source: Path) -> str | None:
    """Describe the damage of a checkpoint and name an intact one; None where there is no damage."""
    if (damage := checkpoints.damage(source)) is None:
        return None
    for other in reversed(checkpoints.saved(source.parent)):
        if other != source and checkpoints.damage(other) is None:
            return f"{damage}; {other.name} is intact: --resume --checkpoint {other.name} goes on there"
    return f"{damage}; no other one is intact"


def drop_later(source: Path, own: Processes) -> None:
    """Remove the checkpoints after ``source``, from which all processes now go on."""
    own.barrier()
    if own.first:
        found = checkpoints.saved(source.parent)
        for later in found[found.index(source) + 1 :]:
            checkpoints.drop(later)
