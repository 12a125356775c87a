"""Options that several commands have, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import fitting
from ..alit_format import MAX_LENGTH, FormatError
from ..checks import check_choice
from ..console import console, fail, printable
from ..criteria import CodeError, FixedLength, MaxL1, MinSSIM, RelativeL1
from ..criterion import Criterion, Prepared
from ..devices import choose
from ..fitting import FITS, Fitted
from ..folders import Listing
from ..prediction import Budget, Predicted
from ..tokenizer import AdaptiveTokenizer

Photos = Annotated[
    list[Path], typer.Argument(help="Images of any kind and orientation, or folders of them.")
]
Model = Annotated[
    str,
    typer.Option(
        help="Name of shipped weights, a model file of alit train or convert, or owner/name on the Hugging Face Hub."
    ),
]
OfModel = Annotated[
    str,
    typer.Argument(
        help="Model file, the name of shipped weights, or owner/name on the Hugging Face Hub."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, or cuda:1.")]
Recursive = Annotated[
    bool, typer.Option("--recursive/--no-recursive", help="Look into folders within folders.")
]
MaxMegapixels = Annotated[
    float,
    typer.Option(help="Refuse larger images; reading takes 5 MB a megapixel.", min=0.0),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--max-l1",
        help="Stop at this mean pixel error instead, pixels in [0, 1].",
        min=0.0,
        max=1.0,
    ),
]
#: Threshold of :class:`alit.RelativeL1`, the criterion if none is asked for.
RELATIVE_L1 = 0.35
RelativeThreshold = Annotated[
    float | None,
    typer.Option(
        "--relative-l1",
        help="Stop at this mean pixel error, as a fraction of the image's own contrast. Without any such option: "
        f"{RELATIVE_L1}. A larger one means fewer tokens.",
        min=0.0,
        max=2.0,
    ),
]
SSIMThreshold = Annotated[
    float | None,
    typer.Option(
        "--min-ssim", help="Stop at this structural similarity (SSIM), at most 1, instead."
    ),
]
CodeThreshold = Annotated[
    float | None,
    typer.Option(help="Stop at this mean error of the base tokenizer's codes instead (faster)."),
]
Predict = Annotated[
    bool,
    typer.Option(
        "--predict",
        help="Let the model's length head predict how many tokens the limit takes, instead of trying.",
    ),
]
Tokens = Annotated[int | None, typer.Option(help="A fixed number of tokens instead.")]
Fit = Annotated[
    str,
    typer.Option(
        help="whole: all of an image, resized to about as many pixels as the model's own; crop: its center, of the "
        "model's shape; pad: all of it, never enlarged, its edge repeated up to whole patches."
    ),
]

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel="Printing"),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document on stdout, for other programs.",
        rich_help_panel="Printing",
    ),
]

#: The criterion that each option asks for, by the option's parameter.
CRITERIA: dict[str, Callable[[Any], Criterion]] = {
    "relative_l1": RelativeL1,
    "max_l1": MaxL1,
    "min_ssim": MinSSIM,
    "code_error": CodeError,
    "tokens": FixedLength,
    "budget": Budget,
}

#: Options with which ``--predict`` works, and their names in :class:`alit.Predicted`.
PREDICTED = {
    "relative_l1": "max_relative_l1",
    "max_l1": "max_l1",
    "code_error": "max_code_error",
}


def criterion(
    model: AdaptiveTokenizer, *, predict: bool = False, **options: float | None
) -> Criterion:
    """Criterion of the one option that is given, of a command's ``options``; without any, ``RelativeL1(RELATIVE_L1)``.

    Args:
        predict: let the length head predict the tokens for the limit that is given.

    Raises:
        ValueError: several options, a value that the criterion or the model refuses, or a limit that is not predicted.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        names = " or ".join("--" + name.replace("_", "-") for name in options)
        raise ValueError(f"expected {names}, got several")
    ((name, value),) = given.items() or {"relative_l1": RELATIVE_L1}.items()
    if predict and name not in PREDICTED:
        shown = ", ".join("--" + x.replace("_", "-") for x in PREDICTED)
        raise ValueError(
            f"--predict: expected one of {shown} with it, got --{name.replace('_', '-')}"
        )
    chosen = Predicted(**{PREDICTED[name]: value}) if predict else CRITERIA[name](value)
    if isinstance(chosen, Prepared):
        chosen.check(model)
    return chosen


def load(model: str, device: str) -> AdaptiveTokenizer:
    """Model on its device; raises as :meth:`AdaptiveTokenizer.from_pretrained` and :func:`choose`."""
    return AdaptiveTokenizer.from_pretrained(model).to(choose(device))


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Context manager: what is wrong with an ``.alit`` file is said with its name."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{printable(source)}: {error}") from error


def loader(model: AdaptiveTokenizer, fit: str, max_megapixels: float) -> Callable[[Path], Fitted]:
    """Function that reads a file as an image fitted to a model.

    Raises:
        ValueError: an unknown ``fit``.
    """
    check_choice("fit", fit, FITS)
    size, patch = model.config.image_size, model.config.base.patch_size
    return lambda path: fitting.load(path, size, patch, fit, max_megapixels=max_megapixels)


def check_writes_files(model: AdaptiveTokenizer) -> None:
    """Raise ``ValueError`` if ``.alit`` files cannot hold a model's tokens."""
    config = model.config
    if config.bottleneck != "quantized" or config.quirks.unquantized_tokens:
        raise ValueError(f"model: expected one that gives indices, got a {config.bottleneck} one")
    if config.max_tokens > MAX_LENGTH:
        raise ValueError(f"model: expected at most {MAX_LENGTH} tokens an image for .alit files")


def check_another(source: str | Path, target: Path) -> None:
    """Raise ``ValueError`` if a command would replace the file that it reads."""
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ValueError(f"target: {target} is the source; choose another file")


def check_free(targets: Iterable[Path], overwrite: bool) -> None:
    """Raise ``ValueError`` if a file is there already that is not to be replaced."""
    for target in targets:
        if not overwrite and (target.exists() or target.is_symlink()):
            raise ValueError(
                f"output: {printable(target)} is there already; choose another folder, or --overwrite"
            )


def say_what_is_missing(listing: Listing) -> None:
    """Print how many files in folders are no images; name those that were skipped and exit with status 1, if any."""
    if beside := listing.beside():
        console.out(beside)
    if skipped := listing.skipped():
        fail(skipped)


def numbers(argument: str, given: str) -> list[int]:
    """Integers of a list with commas; raises ``ValueError`` that names the argument."""
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"{argument}: expected numbers such as 32,64,256, got {given!r}") from None
