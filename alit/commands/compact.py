"""``alit compact``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import model_file
from ..console import console, printable
from ..tokenizer import AdaptiveTokenizer
from .options import Json, Quiet, check_another


def compact(
    source: Annotated[
        str,
        typer.Argument(
            help="Model file, such as a run's model.safetensors, or owner/name on the Hugging Face Hub."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store a model in 16 bits, but for what exceeds them: half the size, for passing on.

    The model of a run, for example:

        alit compact run/model.safetensors small.safetensors

    Models are float32 again when they are loaded.
    """
    console.speak(quiet=quiet, as_json=as_json)
    check_another(source, target)
    model = AdaptiveTokenizer.from_pretrained(source)
    model_file.write(target, model.config, model_file.halved(model.state_dict()))
    size = target.stat().st_size
    console.result(
        {"file": str(target), "bytes": size}, f"{printable(target)}: {size / 1e6:.1f} MB"
    )
