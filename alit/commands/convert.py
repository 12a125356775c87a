"""``alit convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import published
from ..atomic_files import check_replaceable
from ..config import SIZES
from ..console import console, printable, report
from ..tokenizer import AdaptiveTokenizer
from .options import Json, Quiet, check_another


def convert(
    source: Annotated[Path, typer.Argument(help="Published checkpoint (.pth).")],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    weights: Annotated[
        str, typer.Option(help="'ema', as the published evaluation uses, or 'model'.")
    ] = "ema",
    halting: Annotated[str, typer.Option(help="'mask' for a model trained with halting.")] = "off",
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, where the size is not a published one.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a published checkpoint. Nothing in it is executed; its training losses are dropped.

    Its tensors say which model it holds:

        alit convert official.pth model.safetensors

    But for the number of attention heads, where the size is not a published one: --heads.
    """
    console.speak(quiet=quiet, as_json=as_json)
    check_another(source, target)
    check_replaceable(target)
    report(f"reading {printable(source.name)}")
    state = published.read_official(source, weights=weights)
    config = published.infer_config(state, heads=heads, halting=halting)
    report(f"writing {printable(target.name)}")
    AdaptiveTokenizer.from_state(config, state).save_pretrained(target)
    shape = config.encoder
    names = {size: name for name, size in SIZES.items()}
    name = names.get((shape.width, shape.layers, shape.heads), "custom size")
    about = {
        "file": str(target),
        "size": name,
        "base": config.base.kind,
        "bottleneck": config.bottleneck,
        "max_tokens": config.max_tokens,
    }
    console.result(
        about,
        f"{printable(target)}: {name}, {config.base.kind} base, {config.bottleneck}, up to {config.max_tokens} tokens",
    )
