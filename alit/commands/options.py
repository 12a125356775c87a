"""Options that several commands have, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import fitting
from ..checks import check_choice
from ..console import console, fail
from ..criteria import CodeError, Criterion, FixedLength, MaxL1
from ..devices import choose
from ..fitting import FITS, Fitted
from ..folders import Listing
from ..tokenizer import AdaptiveTokenizer

Photos = Annotated[
    list[Path], typer.Argument(help="Pictures of any kind and orientation, or folders of them.")
]
Model = Annotated[
    str, typer.Option(help="Name of shipped weights, or a model file of alit train or convert.")
]
Device = Annotated[
    str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, or one of several: cuda:1.")
]
Recursive = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Look into folders within folders.")
]
MaxMegapixels = Annotated[
    float,
    typer.Option(help="Refuse larger pictures; reading takes 5 MB a megapixel.", min=0.0),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--max-l1",
        help="Stop at this mean pixel error, pixels in [0, 1]. Without any such option: 0.08.",
    ),
]
Tokens = Annotated[int | None, typer.Option(help="A fixed number of tokens instead.")]
Fit = Annotated[
    str,
    typer.Option(
        help="whole: all of a picture, resized to about as many pixels as the model's own; crop: its centre, of the "
        "model's shape; pad: all of it, never enlarged, its edge repeated up to whole patches."
    ),
]

#: The criterion that each option asks for, by the option's parameter.
CRITERIA: dict[str, Callable[[Any], Criterion]] = {
    "max_l1": MaxL1,
    "code_error": CodeError,
    "tokens": FixedLength,
}


def criterion(model: AdaptiveTokenizer, **options: float | None) -> Criterion:
    """The one that is given, of the ``options`` that a command has; without any, a mean pixel error of 0.08.

    Raises:
        ValueError: several are, or a value that the criterion or the model does not take.
    """
    given = [CRITERIA[name](value) for name, value in options.items() if value is not None]
    if len(given) > 1:
        names = " or ".join("--" + name.replace("_", "-") for name in options)
        raise ValueError(f"expected {names}, got several")
    chosen = given[0] if given else MaxL1(0.08)
    if isinstance(chosen, FixedLength):
        chosen.check(model, 1)
    return chosen


def load(model: str, device: str) -> AdaptiveTokenizer:
    """A model on its device; raises as :meth:`AdaptiveTokenizer.from_pretrained` and :func:`choose`."""
    return AdaptiveTokenizer.from_pretrained(model).to(choose(device))


def loader(model: AdaptiveTokenizer, fit: str, max_megapixels: float) -> Callable[[Path], Fitted]:
    """What reads a picture as an image for a model.

    Raises:
        ValueError: an unknown ``fit``.
    """
    check_choice("fit", fit, FITS)
    size, patch = model.config.image_size, model.config.base.patch_size
    return lambda path: fitting.load(path, size, patch, fit, max_megapixels=max_megapixels)


def check_another(source: str | Path, target: Path) -> None:
    """Raise ``ValueError`` where a command would replace the file that it reads."""
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ValueError(f"target: {target} is the source; choose another file")


def say_what_is_missing(listing: Listing) -> None:
    """Files in folders that are no pictures, and those that were skipped, for which the status is 1."""
    if beside := listing.beside():
        console.out(beside)
    if skipped := listing.skipped():
        fail(skipped)
