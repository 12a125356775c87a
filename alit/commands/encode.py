"""``alit encode``."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from .. import images
from ..alit_format import MAX_LENGTH, Reader
from ..atomic_files import check_replaceable, replacing
from ..console import console, printable, progress
from ..criteria import Criterion
from ..encoding import Progress
from ..fitting import Fitted, most_tokens
from ..folders import Listing, find
from ..picture_records import file_name
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from . import options
from .info import summary


def encode(
    photos: options.Photos,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .alit file to write.")],
    model: options.Model = "nano",
    max_l1: options.Threshold = None,
    code_error: Annotated[
        float | None, typer.Option(help="Stop at this mean error of base codes instead (faster).")
    ] = None,
    tokens: options.Tokens = None,
    fit: options.Fit = "whole",
    in_flight: Annotated[
        int, typer.Option(help="Images encoded together, about; bounds memory.", min=1)
    ] = 8,
    recursive: options.Recursive = True,
    max_megapixels: options.MaxMegapixels = images.MAX_MEGAPIXELS,
    device: options.Device = "auto",
) -> None:
    """Encode pictures to one .alit file, each in as few tokens as it needs.

    How few, a mean pixel error says, or an error of base codes; or all get the same number. Names and sizes of the
    pictures are in the file too.

        alit encode photo.jpg -o photo.alit

        alit encode holiday/ -o holiday.alit --max-l1 0.06

        alit encode holiday/ -o holiday.alit --tokens 64

        alit encode holiday/ -o holiday.alit --fit crop

    alit decode makes pictures of the file, with the model that wrote it and no other. Files that cannot be read are
    named at the end, and the status is 1; the others are encoded all the same.
    """
    loaded = options.load(model, device)
    criterion = options.criterion(loaded, max_l1=max_l1, code_error=code_error, tokens=tokens)
    load = options.loader(loaded, fit, max_megapixels)
    listing = find(photos, recursive=recursive)
    _check(loaded, listing, output)
    said: list[Said] = []
    sequences = _encoded(loaded, listing, criterion, in_flight, load, said)
    names, originals, padding = zip(*said, strict=True)
    data = sequences.to_bytes(loaded.identity(), names=names, originals=originals, padding=padding)
    with replacing(output) as temporary:
        temporary.write_bytes(data)
    console.out(f"{printable(output)}: {summary(Reader(io.BytesIO(data)))}")
    options.say_what_is_missing(listing)


#: What the file says of a picture: its name, original size and padding.
Said = tuple[str, tuple[int, int], tuple[int, int]]


def _check(model: AdaptiveTokenizer, listing: Listing, output: Path) -> None:
    """What can be known before any work."""
    config = model.config
    if config.bottleneck != "quantized" or config.quirks.unquantized_tokens:
        raise ValueError(f"model: expected one that gives indices, got a {config.bottleneck} one")
    if config.max_tokens > MAX_LENGTH:
        raise ValueError(f"model: expected at most {MAX_LENGTH} tokens an image for .alit files")
    check_replaceable(output)
    if output.resolve() in {path.resolve() for path in listing.pictures}:
        raise ValueError(f"output: {output} is one of the pictures; choose another file")


def _encoded(
    model: AdaptiveTokenizer,
    listing: Listing,
    criterion: Criterion,
    in_flight: int,
    load: Callable[[Path], Fitted],
    said: list[Said],
) -> TokenSequence:
    """Of all pictures that can be read, with as many rows in the encoder as ``in_flight`` images have at their longest.

    ``said`` is filled with what the file is to say of them.

    Raises:
        OSError: there is none.
    """

    def readable() -> Iterator[Tensor]:
        for path, picture in listing.loaded(load):
            said.append((file_name(path.name), picture.original, picture.padding))
            yield picture.image.to(model.latent_tokens)

    own, most = model.num_image_tokens, model.config.max_tokens
    rows = max(in_flight * (own + most), 1 + most_tokens(own - 1) + most)
    with progress("encoding") as advance:

        def on_progress(state: Progress) -> None:
            total = max(1, len(listing.pictures) - len(listing.unreadable))
            advance(state.images_done / total, f"{state.images_done}/{total}")

        stream = model.encode_stream(
            readable(), criterion, max_tokens_in_flight=rows, on_progress=on_progress
        )
        sequences = list(stream)
    if not sequences:
        raise OSError(listing.skipped())
    return TokenSequence.concatenate(sequences)
