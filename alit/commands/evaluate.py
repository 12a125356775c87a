"""``alit evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic_files import replacing
from ..console import console, counted, printable
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

#: Suites of drawn pictures, by name.
SUITES = {"simple": drawings}


def evaluate(
    model: options.OfModel,
    data: Annotated[Path | None, typer.Option(help="Folder of pictures.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Instead of a folder: simple, drawn pictures of eight kinds.")
    ] = None,
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
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Criteria at several limits: asked against got.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the weights that LPIPS and rFID need.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """L1, PSNR, SSIM and codebook usage of every length, beside a thumbnail of as many bits.

    And beside image files of as many bytes; and what each iteration adds.
    LPIPS, rFID and class agreement, where their networks are at hand.

        alit evaluate run/model.safetensors --data photos

    A tokenizer that loses to a thumbnail has learned nothing.
    """
    listing = _listing(data, suite, recursive)
    listing.pictures = listing.pictures[:limit]
    if output is not None:
        pyplot()  # a missing library is reported before any work
    others = networks(choose(device), fetch=fetch)
    loaded = options.load(model, device)
    pictures: list[Path] | list[Drawing] = listing.pictures
    if suite is not None:
        pictures = SUITES[suite](loaded.config.image_size[0])[:limit]
    total = counted(len(pictures), "picture")
    reading: dict[str, Any] = {
        "protocol": protocol,
        "batch_size": batch_size,
        "max_megapixels": max_megapixels,
    }
    calibrated: list[Calibration] = []
    with console.status("evaluating") as status:
        reading["on_batch"] = lambda done: status.update(f"{done} of {total}")
        result = run(loaded, pictures, networks=others, **reading)
        if calibration:
            criteria = usual_limits(loaded, pictures, **reading)
            calibrated = calibrate(loaded, pictures, criteria, **reading)
    if output is not None:
        _write(output, model, result, calibrated)
    _show(result, calibrated, [*others.left_out, *image_files.left_out()])
    listing.unreadable = result.unreadable
    options.say_what_is_missing(listing)


def _listing(data: Path | None, suite: str | None, recursive: bool) -> Listing:
    """The pictures of the folder; none where there is a suite instead."""
    if data is not None and suite is None:
        return in_folder(data, recursive=recursive)
    if suite is None or data is not None:
        got = "neither" if data is None else "both"
        raise ValueError(f"data: expected either --data FOLDER or --suite NAME, got {got}")
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    return Listing()


def _show(result: Evaluation, calibrated: list[Calibration], left_out: list[str]) -> None:
    for table in tables(result):
        console.print(table)
    if calibrated:
        console.print(calibration_table(calibrated))
    for reason in left_out:
        console.out(f"left out {printable(reason)}")


def _write(folder: Path, model: str, result: Evaluation, calibrated: list[Calibration]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": model, **asdict(result), "calibration": [asdict(x) for x in calibrated]}
    with replacing(folder / "evaluation.json") as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    plot(result, folder / "evaluation.png")
