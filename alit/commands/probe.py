"""``alit probe``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..atomic_files import check_replaceable, replacing
from ..console import console, printable
from ..evaluation import labeled
from ..evaluation import probe as run
from ..evaluation.report import plot_probe, probe_table
from ..folders import Listing
from ..images import MAX_MEGAPIXELS
from ..plots import pyplot
from . import options


def probe(
    model: options.OfModel,
    data: Annotated[
        Path, typer.Option(help="Folder with a folder of images for each class, named by it.")
    ],
    test: Annotated[
        Path | None,
        typer.Option(help="Such a folder to test on; else a quarter of each class is left out."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the results.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of the results.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Numbers of tokens, such as 16,64,256. Default: all whole iterations."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the split, of random weights and of intervals.", min=0)
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    max_megapixels: options.MaxMegapixels = MAX_MEGAPIXELS,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Classify images by their tokens: linear classifiers at every length, beside controls.

    Of the latents' mean, of their codes' mean, and of all codes one behind another; beside the pixels of a thumbnail of
    as many bits, and the same tokens from random weights.

        alit probe nano --data flowers -o probe.json

        alit probe nano --data flowers/train --test flowers/test --lengths 32,256 --plot probe.png

    Tokens that tell no more than random weights do have learned nothing of classes.
    """
    console.speak(quiet=quiet, as_json=as_json)
    wanted = None if lengths is None else options.numbers("lengths", lengths)
    for path in (output, plot):
        if path is not None:
            check_replaceable(path)
    if plot is not None:
        pyplot()  # a missing library is reported before any work
    sets = [labeled(data), *([] if test is None else [labeled(test, "test")])]
    loaded = options.load(model, device)
    result = run(
        loaded,
        *sets,
        lengths=wanted,
        seed=seed,
        batch_size=batch_size,
        max_megapixels=max_megapixels,
    )
    found = {"model": model, **asdict(result)}
    if output is not None:
        with replacing(output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n")
    if plot is not None:
        plot_probe(result, plot)
    listing = Listing()
    for each in sets:
        listing.add(each.listing)
    files = [printable(path) for path in (output, plot) if path is not None]
    console.result({**found, "skipped": listing.names_skipped()}, probe_table(result), *files)
    options.say_what_is_missing(listing)
