"""``alit encode``."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import images
from ..alit_format import Reader
from ..atomic_files import check_replaceable, replacing
from ..console import console, printable, report
from ..criteria import FixedLength
from ..criterion import Criterion
from ..curves import l1_curves
from ..encoding import Progress
from ..fitting import Fitted, most_tokens
from ..folders import Listing, find
from ..image_records import file_name
from ..length_head import curve_lengths
from ..prediction import Budget
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from . import options
from .info import described, summary


def encode(
    photos: options.Photos,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The .alit file to write; one that is there is replaced."
        ),
    ],
    model: options.Model = "nano",
    relative_l1: options.RelativeThreshold = None,
    max_l1: options.Threshold = None,
    min_ssim: options.SSIMThreshold = None,
    code_error: options.CodeThreshold = None,
    tokens: options.Tokens = None,
    fit: options.Fit = "whole",
    predict: options.Predict = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Average number of tokens per image instead, spent where they help most; reads each image twice."
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(help="About how many images are encoded together; bounds memory.", min=1)
    ] = 8,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = images.MAX_MEGAPIXELS,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Encode images to one .alit file, each in as few tokens as it needs.

    The number follows from a limit on an error: of pixels as a fraction of the image's contrast, of pixels, in
    structure, or of base codes. Where no number meets the limit, an image keeps the tokens that help. Or all images get
    the same number. Names and sizes of the images are in the file too.

        alit encode photo.jpg -o photo.alit

        alit encode holiday/ -o holiday.alit --max-l1 0.06

        alit encode holiday/ -o holiday.alit --tokens 64

        alit encode holiday/ -o holiday.alit --fit crop

        alit encode holiday/ -o holiday.alit --budget 96

    alit decode makes images of the file, with the model that wrote it and no other. Files that cannot be read are
    named at the end, and the status is 1; the others are encoded all the same.
    """
    console.speak(quiet=quiet, as_json=as_json)
    loaded = options.load(model, device)
    limits: dict[str, float | None] = {
        "relative_l1": relative_l1,
        "max_l1": max_l1,
        "min_ssim": min_ssim,
    }
    limits |= {"code_error": code_error, "tokens": tokens, "budget": budget}
    criterion = options.criterion(loaded, predict=predict, **limits)
    load = options.loader(loaded, fit, max_megapixels)
    listing = find(photos, recursive=recursive)
    _check(loaded, listing, output)
    wanted = listing
    if isinstance(criterion, Budget):
        wanted, criterion = _spent(loaded, listing, criterion, in_flight, load)
    said: list[Said] = []
    sequences, unmet = _encoded(loaded, wanted, criterion, in_flight, load, said)
    names, originals, padding = zip(*said, strict=True)
    data = sequences.to_bytes(loaded.identity(), names=names, originals=originals, padding=padding)
    with replacing(output) as temporary:
        temporary.write_bytes(data)
    written = Reader(io.BytesIO(data))
    console.result(
        {
            "file": str(output),
            **(described(written) if as_json else {}),
            "unmet": unmet,
            "skipped": listing.names_skipped(),
        },
        f"{printable(output)}: {summary(written)}",
        *([f"{unmet} of them miss the limit with any number of tokens"] if unmet else []),
    )
    options.say_what_is_missing(listing)


#: Name, original size and padding of an image, as the file holds them.
Said = tuple[str, tuple[int, int], tuple[int, int]]


def _check(model: AdaptiveTokenizer, listing: Listing, output: Path) -> None:
    """Check model and output before any work; raises ``ValueError`` or ``OSError``."""
    options.check_writes_files(model)
    check_replaceable(output)
    if output.resolve() in {path.resolve() for path in listing.images}:
        raise ValueError(f"output: {output} is one of the images; choose another file")
    if output.suffix.lower() != ".alit":
        raise ValueError(f"output: {output}: expected a name that ends in .alit")


def _spent(
    model: AdaptiveTokenizer,
    listing: Listing,
    budget: Budget,
    in_flight: int,
    load: Callable[[Path], Fitted],
) -> tuple[Listing, FixedLength]:
    """Images that can be read, and the length that the budget gives each.

    Raises:
        OSError: no image can be read.
    """
    readable: list[Path] = []
    curves: list[Tensor] = []
    loaded = listing.loaded(load)
    while some := list(itertools.islice(loaded, in_flight)):
        report("measuring", len(readable), listing.readable, "images")
        images = [fitted.image.to(model.latent_tokens) for _, fitted in some]
        curves.append(l1_curves(model, images))
        readable += [path for path, _ in some]
        report("measuring", len(readable), listing.readable, "images")
    if not readable:
        raise OSError(listing.skipped())
    lengths = budget.spent(torch.cat(curves), curve_lengths(model.config))
    return Listing(readable), FixedLength(lengths)


def _encoded(
    model: AdaptiveTokenizer,
    listing: Listing,
    criterion: Criterion,
    in_flight: int,
    load: Callable[[Path], Fitted],
    said: list[Said],
) -> tuple[TokenSequence, int]:
    """Tokens of all images that can be read, and how many of them no number of tokens brings within the limit.

    The encoder has as many rows as ``in_flight`` images at their longest.

    ``said`` is filled with what the file is to hold of them beside tokens.

    Raises:
        OSError: no image can be read; or one has become unreadable since lengths were found for all.
    """

    def readable() -> Iterator[Tensor]:
        for path, fitted in listing.loaded(load):
            said.append((file_name(path.name), fitted.original, fitted.padding))
            yield fitted.image.to(model.latent_tokens)

    own, most = model.num_image_tokens, model.config.max_tokens
    rows = max(in_flight * (own + most), 1 + most_tokens(own - 1) + most)
    report("encoding", 0, listing.readable, "images")

    unmet = 0

    def on_progress(state: Progress) -> None:
        nonlocal unmet
        unmet = state.images_unmet
        report("encoding", state.images_done, listing.readable, "images")

    sequences = list(
        model.encode_stream(
            readable(), criterion, max_tokens_in_flight=rows, on_progress=on_progress
        )
    )
    changed = isinstance(criterion, FixedLength) and criterion.images not in (None, len(sequences))
    if not sequences or changed:
        raise OSError(listing.skipped())
    return TokenSequence.concatenate(sequences), unmet
