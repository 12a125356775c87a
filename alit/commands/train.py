"""``alit train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import training
from ..console import console, counted, printable
from ..shipped import find
from ..training import Interrupted, TrainingConfig, checkpoints
from ..training.fields import assignments
from . import options

#: Folder of the shipped configurations.
CONFIGS = Path(training.__file__).parent / "configs"


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            help="Configuration (YAML), or the name of a shipped one, such as nano-dct."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="base, 1 (base tokens), 2 (pixels), length (its prediction) or generator."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, or shards: 'x-{000..099}.tar'. Stage generator: .alit files."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    size: Annotated[str | None, typer.Option(help="nano, tiny, small, base or semilarge.")] = None,
    base: Annotated[str | None, typer.Option(help="Base tokenizer: dct, vqgan or vae.")] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Model file to start from, such as stage 1's for stage 2.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Stage generator: the model that wrote the .alit files.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Stage generator: files (a class is a .alit file, or a folder of them), or a CSV file of names and"
            " classes."
        ),
    ] = None,
    perceptual: Annotated[
        str | None, typer.Option(help="Stage 2: lpips, or off, which needs no weights.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step, over all processes.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by default 1.5e-4 times batch size / 256."),
    ] = None,
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
    checkpoint: Annotated[
        str | None,
        typer.Option(help="With --resume: go on from this one, such as checkpoint-00000500."),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with another configuration.")
    ] = False,
    allow_addresses: Annotated[
        bool, typer.Option("--allow-addresses", help="Shards may be http and https addresses.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train a tokenizer: on one machine as it is, on several GPUs under torchrun.

    Either a configuration, whose fields the options replace, or options alone:

        alit train --size nano --data photos --output run

        alit train nano-dct --data photos --output run

        alit train nano/generator --data tokens --labels files --output run

        torchrun --nproc-per-node 8 -m alit train config.yaml --output run --resume

    Ctrl-C leaves a checkpoint from which --resume goes on.
    """
    first = os.environ.get("RANK", "0") == "0"  # one voice under torchrun
    console.speak(quiet=quiet or not first, as_json=as_json and first)
    fields: dict[str, Any] = {
        "stage": stage,
        "data": data,
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "device": device,
        "start_from": start_from,
        "tokenizer": tokenizer,
        "labels": labels,
        "perceptual": perceptual,
    }
    model = {"size": size, "base": base, "image_size": image_size}
    model = {name: value for name, value in model.items() if value is not None}
    chosen = assignments(option or [])
    if not isinstance(chosen.setdefault("model", {}), dict):
        raise ValueError(f"model: expected options by name, got {chosen['model']!r}")
    model = {**chosen.pop("model"), **model}
    fields |= chosen
    file = None if config is None else find(config, CONFIGS, ".yaml", "a configuration")
    if model:
        before = TrainingConfig.read(file).model if file else TrainingConfig().model
        fields["model"] = {**before, **model}
    given = {name: value for name, value in fields.items() if value is not None}
    described = TrainingConfig.read(file, **given) if file else TrainingConfig.from_mapping(given)
    if described.output is None:
        raise ValueError("output: expected a folder for the run (--output)")
    if described.stage == "2" and described.start_from is None and not resume:
        console.out("stage 2 without --start-from: from random weights")
    if resume and not checkpoints.saved(Path(described.output)):
        console.out(f"{printable(described.output)}: no checkpoint there; from the beginning")
    try:
        result = training.train(
            described,
            resume=resume,
            checkpoint=checkpoint,
            allow_changes=allow_changes,
            allow_addresses=allow_addresses,
        )
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from error
    if result.unreadable:
        shown = "\n  ".join(map(printable, result.unreadable[:10]))
        console.out(f"skipped, unreadable or without an image: {len(result.unreadable)}\n  {shown}")
    model_file = Path(described.output) / "model.safetensors"
    console.result(
        {"model": str(model_file), "steps": result.steps, "skipped": result.unreadable},
        f"{printable(model_file)}: after {counted(result.steps, 'step')}",
    )
