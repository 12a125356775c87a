"""``alit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import console, printable
from ..export import FORMATS, write
from ..tokenizer import AdaptiveTokenizer
from .options import Json, OfModel, Quiet, numbers


def export(
    model: OfModel,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help=f"{', '.join(FORMATS)}: a program, a network, or compiled code.")
    ] = "pt2",
    lengths: Annotated[
        str,
        typer.Option(
            help="Numbers of tokens, an encoder for each, such as 32,64,256; by default the most."
        ),
    ] = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write encoder and decoder as programs that need no alit: torch.export, ONNX or AOTI.

    A file for the encoder of each length, and one for the decoder:

        alit export nano -o programs --format onnx --lengths 32,256

    Each file is tried on random images before it is kept, and takes any number of them. Programs are for the CPU.
    """
    console.speak(quiet=quiet, as_json=as_json)
    tokenizer = AdaptiveTokenizer.from_pretrained(model)
    chosen = numbers("lengths", lengths) if lengths else [tokenizer.config.max_tokens]
    files, shown = [], []
    for name, difference in write(tokenizer, output, format, chosen).items():
        same = "indices equal the model's" if name.startswith("encoder") else ""
        same = same or f"pixels within {difference:.1g} of the model's"
        path = output / name
        size = path.stat().st_size
        files.append({"file": str(path), "bytes": size, "difference": difference})
        shown.append(f"{printable(path)}: {size / 1e6:.1f} MB, {same}")
    console.result({"folder": str(output), "format": format, "files": files}, *shown)
