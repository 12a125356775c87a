"""``alit analyze``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..analysis import THRESHOLDS, Analysis
from ..analysis import analyze as run
from ..analysis.page import page, verdicts
from ..atomic_files import replacing
from ..console import console, counted, fail, printable, report
from ..devices import choose
from ..evaluation import classifier as load_classifier
from ..images import MAX_MEGAPIXELS
from . import options


def analyze(
    model: options.OfModel,
    data: Annotated[Path, typer.Option(help="Folder of images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for page, images and analysis.json.")
    ],
    scores: Annotated[
        Path | None,
        typer.Option(help="CSV file of human scores: columns file and complexity."),
    ] = None,
    segments: Annotated[
        Path | None, typer.Option(help="Folder of human segmentations: NAME.png for each image.")
    ] = None,
    out_of_domain: Annotated[
        Path | None, typer.Option(help="A second folder of images, of another kind.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="timm:NAME or torchvision:NAME. Default: EfficientNet-Lite0, if it is installed."
        ),
    ] = None,
    max_l1: Annotated[
        list[float] | None,
        typer.Option(
            "--max-l1",
            help="L1 errors at which tokens are counted; may be repeated. Default: 0.04 to 0.1.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only so many images of a folder, the first by name.", min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.", min=0)] = 0,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = MAX_MEGAPIXELS,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show on a page what the number of tokens depends on, and what tokens know of an image.

    Complexity and familiarity; with a classifier (the extra perceptual) what reconstructions still show; with segments
    what tokens look at. Each is compared with a control that knows nothing.

        alit analyze nano --data photos -o analysis

        alit analyze nano --data photos --scores scores.csv --segments segments --out-of-domain drawings -o analysis

    Intervals are bootstrapped over the images; use a hundred or more.
    """
    console.speak(quiet=quiet, as_json=as_json)
    networks = load_classifier(choose(device), classifier)
    loaded = options.load(model, device)
    result = run(
        *(loaded, data),
        scores=scores,
        segments=segments,
        out_of_domain=out_of_domain,
        networks=networks,
        thresholds=max_l1 or THRESHOLDS,
        limit=limit,
        recursive=recursive,
        batch_size=batch_size,
        max_megapixels=max_megapixels,
        seed=seed,
    )
    report("drawing the page")
    _write(output, model, result)
    found, page_file = verdicts(result), (output / "index.html").resolve()
    for line in result.left_out:
        console.out(f"left out {printable(line)}")
    console.result(
        {"page": str(page_file), "verdicts": found, "model": model, **result.numbers()},
        *found.values(),
        f"{printable(page_file)}: open it in a browser",
    )
    if result.skipped:
        fail("\n  ".join([f"{counted(len(result.skipped), 'file')} skipped:", *result.skipped]))


def _write(folder: Path, model: str, result: Analysis) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "analysis.json") as file:
        file.write_text(
            json.dumps({"model": model, **result.numbers()}, indent=1, allow_nan=False) + "\n"
        )
    for name, gallery in result.galleries.items():
        gallery.save(folder / f"{name}.png")
    with replacing(folder / "index.html") as file:
        file.write_text(page(printable(model), result), encoding="utf-8")
