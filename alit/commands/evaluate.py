"""``alit evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sized
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic_files import replacing
from ..console import console, printable, report
from ..devices import choose
from ..evaluation import (
    Calibration,
    Drawing,
    Evaluation,
    calibrate,
    drawings,
    image_files,
    networks,
    usual_limits,
)
from ..evaluation import evaluate as run
from ..evaluation.report import calibration_table, plot, tables
from ..folders import Listing, in_folder
from ..images import MAX_MEGAPIXELS
from ..plots import pyplot
from . import options

#: Suites of drawn images, by name.
SUITES = {"simple": drawings}


def evaluate(
    model: options.OfModel,
    data: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Instead of a folder: simple (drawn images of eight kinds).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.png.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="pinned, or official: crop and round as the published evaluation.")
    ] = "pinned",
    limit: Annotated[
        int | None, typer.Option(help="Use only so many images, the first by name.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = MAX_MEGAPIXELS,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help="Hold what each criterion reaches against what was asked, at several limits.",
        ),
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the weights that LPIPS and rFID need.")
    ] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure L1, PSNR, SSIM and codebook usage at every length, beside a thumbnail of as many bits.

    Beside image files of as many bytes too, and for each iteration what it adds. LPIPS, rFID and class agreement are
    measured where their networks are installed.

        alit evaluate run/model.safetensors --data photos

    A tokenizer that loses to a thumbnail has learned nothing.
    """
    console.speak(quiet=quiet, as_json=as_json)
    listing = _listing(data, suite, recursive)
    listing.images = listing.images[:limit]
    if output is not None:
        pyplot()  # a missing library is reported before any work
    others = networks(choose(device), fetch=fetch)
    loaded = options.load(model, device)
    images: list[Path] | list[Drawing] = listing.images
    if suite is not None:
        images = SUITES[suite](loaded.config.image_size[0])[:limit]
    reading: dict[str, Any] = {
        "protocol": protocol,
        "batch_size": batch_size,
        "max_megapixels": max_megapixels,
    }
    calibrated: list[Calibration] = []
    result = run(
        loaded, images, networks=others, on_batch=_reporting("evaluating", images), **reading
    )
    if calibration:
        finding = _reporting("finding limits", images)
        criteria = usual_limits(loaded, images, on_batch=finding, **reading)
        trying = _reporting("trying criteria", images)
        calibrated = calibrate(loaded, images, criteria, on_batch=trying, **reading)
    listing.unreadable = result.unreadable
    found = {"model": model, **asdict(result), "calibration": [asdict(x) for x in calibrated]}
    if output is not None:
        _write(output, found, result)
    left_out = [*others.left_out, *image_files.left_out()]
    for reason in left_out:
        console.out(f"left out {printable(reason)}")
    shown = tables(result) + ([calibration_table(calibrated)] if calibrated else [])
    console.result({**found, "left_out": left_out, "skipped": listing.names_skipped()}, *shown)
    options.say_what_is_missing(listing)


def _reporting(what: str, images: Sized) -> Callable[[int], None]:
    """Function that reports how many of the images are done, the progress of ``what``."""
    report(what, 0, len(images), "images")
    return lambda done: report(what, done, len(images), "images")


def _listing(data: Path | None, suite: str | None, recursive: bool) -> Listing:
    """Images of the folder; an empty listing for a suite."""
    if data is not None and suite is None:
        return in_folder(data, recursive=recursive)
    if suite is None or data is not None:
        got = "neither" if data is None else "both"
        raise ValueError(f"data: expected either --data FOLDER or --suite NAME, got {got}")
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    return Listing()


def _write(folder: Path, content: dict[str, Any], result: Evaluation) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "evaluation.json") as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    plot(result, folder / "evaluation.png")
