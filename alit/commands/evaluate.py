"""``alit evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..atomic_files import replacing
from ..console import console, counted, printable
from ..devices import choose
from ..evaluation import Evaluation, networks
from ..evaluation import evaluate as run
from ..folders import in_folder
from ..images import MAX_MEGAPIXELS
from ..plots import BLUE, ORANGE, pyplot, save
from . import options

#: Heading and format of each field of :class:`alit.evaluation.Quality`.
COLUMNS = {
    "l1": ("L1", ".4f"),
    "psnr": ("PSNR", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".3f"),
    "rfid": ("rFID", ".1f"),
}


def evaluate(
    model: Annotated[str, typer.Argument(help="Model file, or the name of shipped weights.")],
    data: Annotated[Path, typer.Option(help="Folder of pictures.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.png.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="pinned, or official: as the published evaluation crops and rounds.")
    ] = "pinned",
    limit: Annotated[
        int | None, typer.Option(help="So many pictures, the first by name.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 8,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = MAX_MEGAPIXELS,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the weights that LPIPS and rFID need.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """L1, PSNR, SSIM and codebook usage of every length, beside a thumbnail of as many bits.

    And LPIPS and rFID, where the weights of their networks are at hand.

        alit evaluate run/model.safetensors --data photos

    A tokenizer that loses to a thumbnail has learned nothing.
    """
    listing = in_folder(data, recursive=recursive)
    files = listing.pictures = listing.pictures[:limit]
    if output is not None:
        pyplot()  # a missing library is reported before any work
    others = networks(choose(device), fetch=fetch)
    loaded = options.load(model, device)
    with console.status("evaluating") as status:
        result = run(
            loaded,
            files,
            protocol=protocol,
            batch_size=batch_size,
            max_megapixels=max_megapixels,
            networks=others,
            on_batch=lambda done: status.update(f"{done} of {len(files)} pictures"),
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "evaluation.json") as file:
            file.write_text(json.dumps({"model": model, **asdict(result)}, indent=1) + "\n")
        _plot(result, output / "evaluation.png")
    console.print(_table(result))
    for reason in others.left_out:
        console.out(f"left out {printable(reason)}")
    listing.unreadable = result.unreadable
    options.say_what_is_missing(listing)


def _table(result: Evaluation) -> Table:
    title = (
        f"{counted(result.pictures, 'picture')}, {result.protocol} protocol; thumbnail in brackets"
    )
    has = [x for x in COLUMNS if getattr(result.lengths[0].model, x) is not None]
    names = [COLUMNS[x][0] for x in has]
    table = Table("tokens", "bits", *names, "codes used", "perplexity", title=title)
    for row in result.lengths:
        values = (
            f"{getattr(row.model, x):{COLUMNS[x][1]}} ({getattr(row.thumbnail, x):{COLUMNS[x][1]}})"
            for x in has
        )
        table.add_row(
            *(str(row.tokens), f"{row.bits:.0f}", *values),
            "" if row.codes_used is None else f"{row.codes_used:.1%}",
            "" if row.perplexity is None else f"{row.perplexity:.0f}",
        )
    return table


def _plot(result: Evaluation, path: Path) -> None:
    figure, panels = pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    bits = [row.bits for row in result.lengths]
    for axes, name, label in zip(
        panels, ("l1", "psnr", "ssim"), ("L1", "PSNR, dB", "SSIM"), strict=True
    ):
        for kind, style, color in (("model", "o-", BLUE), ("thumbnail", "s--", ORANGE)):
            values = [getattr(getattr(row, kind), name) for row in result.lengths]
            axes.plot(bits, values, style, color=color, label=kind)
        axes.set(xlabel="bits per picture", ylabel=label)
    panels[0].legend(frameon=False)
    save(figure, path)
