"""``alit demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..atomic_files import replacing
from ..console import console, printable, reported
from ..demo import figures, live, photographs
from ..demo.measure import measure
from ..demo.page import page
from ..devices import choose
from ..plots import pyplot
from ..tokenizer import AdaptiveTokenizer
from . import options


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for page and images.")
    ] = Path("demo_output"),
    model: options.Model = "nano",
    max_l1: Annotated[
        float, typer.Option("--max-l1", help="Pixel error at which tokens are counted.", min=0.0)
    ] = 0.08,
    device: options.Device = "auto",
    train: Annotated[
        bool, typer.Option("--train", help="Train a small tokenizer live instead.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="With --train: length of the training.", min=1.0)
    ] = 150.0,
    image_size: Annotated[
        int, typer.Option(help="With --train: side of the images, a multiple of 16.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="With --train: seed of weights and batches.")] = 0,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show on a page what the tokenizer does with the photographs that come with scikit-image.

    Writes index.html and its images: reconstructions at every length, the error against tokens beside a
    thumbnail's, tokens per photograph at one error, and where latent tokens look.

        alit demo

        alit demo -o page --max-l1 0.06

    With --train a small tokenizer, without any weights to begin with, learns a dozen of the photographs by heart:

        alit demo --train --seconds 60

    """
    console.speak(quiet=quiet, as_json=as_json)
    start = time.monotonic()
    if train and model != "nano":
        raise ValueError("--model: expected none with --train, which starts without weights")
    if train:
        chosen = str(choose(device))
        pyplot()  # a missing library is reported before any work
        about = live.run(output, seconds, image_size, seed, chosen)
        said = f"images in {printable(output.resolve())} after"
    else:
        loaded = options.load(model, device)
        pyplot()
        _show(loaded, printable(model), output, max_l1)
        index = (output / "index.html").resolve()
        about = {"page": str(index)}
        said = f"{printable(index)}: open it in a browser;"
    took = time.monotonic() - start
    console.result({**about, "seconds": took}, f"{said} {took:.0f} s")


def _show(model: AdaptiveTokenizer, name: str, output: Path, max_l1: float) -> None:
    """Write the page and its images."""
    height, width = model.config.image_size
    if height != width:
        raise ValueError(f"model: expected one of square images, got {width}x{height}")
    photos = photographs(height)
    output.mkdir(parents=True, exist_ok=True)
    measured = measure(model, photos, max_l1=max_l1)
    drawn = (figures.reconstructions, figures.error, figures.tokens, figures.attention)
    for figure in reported(drawn, "drawing", len(drawn), "figures"):
        figure(measured, output / f"{figure.__name__}.png")
    with replacing(output / "index.html") as file:
        file.write_text(page(model, name, measured), encoding="utf-8")
