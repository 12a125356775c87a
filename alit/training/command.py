"""``alit train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import errors, printable
from . import Interrupted, Result, TrainingConfig, checkpoints
from . import train as run


def train(
    config: Annotated[Path | None, typer.Argument(help="Configuration (YAML).")] = None,
    stage: Annotated[str | None, typer.Option(help="base, 1 (base tokens) or 2 (pixels).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of pictures, or shards: 'x-{000..099}.tar'.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    size: Annotated[str | None, typer.Option(help="nano, tiny, small, base or semilarge.")] = None,
    base: Annotated[str | None, typer.Option(help="Base tokenizer: dct, vqgan or vae.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Model file to start from, such as stage 1's for stage 2.")
    ] = None,
    perceptual: Annotated[
        str | None, typer.Option(help="Stage 2: lpips, or off, which needs no weights.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any field of alit.training.TrainingConfig, such as --set precision=float32 or model.code_dim=8.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUTPUT.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with another configuration.")
    ] = False,
) -> None:
    """Train a tokenizer: on one machine as it is, on several GPUs under torchrun.

    Either a configuration file, whose fields the options replace, or options alone:

        alit train --size nano --data photos --output run

        torchrun --nproc-per-node 8 -m alit.cli train config.yaml --output run --resume

    Ctrl-C leaves a checkpoint from which --resume goes on.
    """
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # one voice under torchrun
    fields: dict[str, Any] = {
        "stage": stage,
        "data": data,
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "device": device,
        "start_from": start_from,
        "perceptual": perceptual,
    }
    model = {"size": size, "base": base, "image_size": image_size}
    model = {name: value for name, value in model.items() if value is not None}
    with errors():
        chosen = _assignments(option or [])
        model = {**chosen.pop("model", {}), **model}
        fields |= chosen
        if model:
            before = TrainingConfig.read(config).model if config else TrainingConfig().model
            fields["model"] = {**before, **model}
        given = {name: value for name, value in fields.items() if value is not None}
        described = (
            TrainingConfig.read(config, **given) if config else TrainingConfig.from_mapping(given)
        )
        if described.output is None:
            raise ValueError("output: expected a folder for the run (--output)")
        if described.stage == "2" and described.start_from is None and not resume:
            console.out("stage 2 without --start-from: from random weights")
        if resume and not checkpoints.saved(Path(described.output)):
            console.out(f"{printable(described.output)}: no checkpoint there; from the beginning")
        try:
            result = _run_with_progress(described, resume, allow_changes, console)
        except Interrupted as error:
            console.out(printable(error))
            raise typer.Exit(130) from error
    model_file = printable(Path(described.output) / "model.safetensors")
    console.out(f"{model_file}: after {result.steps} steps")
    if result.unreadable:
        shown = "\n  ".join(map(printable, result.unreadable[:10]))
        console.out(
            f"{len(result.unreadable)} files could not be read and were skipped:\n  {shown}"
        )


def _assignments(texts: list[str]) -> dict[str, Any]:
    """``name=value``, the values as YAML; ``model.name=value`` is an option of the model."""
    if not texts:
        return {}
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as error:
        raise ValueError("--set needs omegaconf: pip install 'alit[train]'") from error
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--set: expected name=value, got {text!r}")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(texts))
    except OmegaConfBaseException as error:
        raise ValueError(f"--set: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    if not isinstance(values.get("model", {}), dict):
        raise ValueError(f"model: expected options by name, got {values['model']!r}")
    return {str(name): value for name, value in values.items()}


def _run_with_progress(
    config: TrainingConfig, resume: bool, allow_changes: bool, console: Console
) -> Result:
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.fields[latest]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=1.0, step=0, latest="")

        def on_log(record: dict[str, float]) -> None:
            progress.update(
                task,
                completed=min(record["done"], 1.0),
                step=int(record["step"]),
                latest=f"loss {record['loss']:.4f}, {record['pictures_per_second']:.1f} pictures/s",
            )

        return run(config, resume=resume, allow_changes=allow_changes, on_log=on_log)
