"""Pictures to ``.alit`` files and back, in bounded memory: what the command line does."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from torch import Tensor

from . import images
from .alit_format import MAX_LENGTH, Reader
from .atomic_files import check_replaceable, reading, replacing
from .console import printable
from .criteria import Criterion
from .encoding import Progress
from .folders import Listing
from .sequence import TokenSequence
from .tokenizer import AdaptiveTokenizer

#: Images decoded together.
BATCH = 8
#: That ``00000.png`` and so on name in order.
MAX_PICTURES = 100_000
#: Lengths in the table of ``show``.
ROWS = 256


def encode(
    model: AdaptiveTokenizer,
    listing: Listing,
    output: Path,
    criterion: Criterion,
    in_flight: int,
    console: Console,
    *,
    max_megapixels: float = images.MAX_MEGAPIXELS,
) -> None:
    """Encode the pictures and write one file; an old file is replaced only when all is written.

    Args:
        listing: pictures; of those that cannot be read it has a line afterwards, and the others are in the file.
        in_flight: images at their longest that the encoder sees at once.

    Raises:
        OSError: no picture that can be read, a file that cannot be written.
        ValueError: a model without a codebook, a criterion that does not fit it, an output that is one of the pictures.
    """
    config = model.config
    if config.bottleneck != "quantized" or config.quirks.unquantized_tokens:
        raise ValueError(f"model: expected one that gives indices, got a {config.bottleneck} one")
    if config.max_tokens > MAX_LENGTH:
        raise ValueError(f"model: expected at most {MAX_LENGTH} tokens an image for .alit files")
    check_replaceable(output)
    if output.resolve() in {path.resolve() for path in listing.pictures}:
        raise ValueError(f"output: {output} is one of the pictures; choose another file")
    rows = in_flight * (model.num_image_tokens + config.max_tokens)
    with _bar(console) as bar:
        task = bar.add_task("encoding", total=len(listing.pictures))

        def on_progress(progress: Progress) -> None:
            total = len(listing.pictures) - len(listing.unreadable)
            bar.update(task, completed=progress.images_done, total=total)

        def load(path: Path) -> Tensor:
            picture = images.load(path, config.image_size, max_megapixels=max_megapixels)
            return picture.to(model.latent_tokens)

        readable = (picture for _, picture in listing.loaded(load))
        stream = list(
            model.encode_stream(
                readable, criterion, max_tokens_in_flight=rows, on_progress=on_progress
            )
        )
    if not stream:
        raise OSError(listing.skipped())
    tokens = TokenSequence.concatenate(stream)
    data = tokens.to_bytes(model.identity())
    with replacing(output) as temporary:
        temporary.write_bytes(data)
    summary = _summary(len(tokens), len(tokens.rows), len(data), config.image_size)
    console.out(f"{printable(output)}: {summary}")


def decode(model: AdaptiveTokenizer, source: Path, output: Path, console: Console) -> None:
    """Decode a file to ``00000.png``, ``00001.png``, ... in ``output``, a few pictures at a time.

    Raises:
        OSError: the file cannot be read, a picture cannot be written.
        ValueError: an image without tokens, or with more than the model makes; more than 100,000 images; a folder with
            higher numbers of that kind, of another file, which would seem to belong to this one. Nothing is written.
        FormatError: no ``.alit`` file, a damaged one, or one that another model wrote.
    """
    with reading(source) as file:
        tokens = Reader(file)
        tokens.expect(model.identity())
        _check_decodable(tokens, model.config.max_tokens)
        output.mkdir(parents=True, exist_ok=True)
        later = [x for x in output.glob("[0-9]" * 5 + "*.png") if x.stem.isdecimal()]
        if later and int(max(later, key=lambda x: int(x.stem)).stem) >= tokens.images:
            raise ValueError(
                f"output: {output} holds more pictures, of another file; choose another folder"
            )
        with _bar(console) as bar:
            task = bar.add_task("decoding", total=tokens.images)
            first, done = 0, 0
            while first < tokens.images:
                lengths = tokens.lengths(first, min(BATCH, tokens.images - first))
                indices = tokens.indices(done, int(lengths.sum()))
                batch = TokenSequence(torch.from_numpy(lengths), torch.from_numpy(indices))
                for b, pixels in enumerate(model.decode(batch), first):
                    images.save_image(images.to_image(pixels), output / f"{b:05}.png")
                first, done = first + len(lengths), done + len(indices)
                bar.update(task, completed=first)
        console.out(f"{printable(output)}: {tokens.images} pictures")


def _check_decodable(tokens: Reader, longest: int) -> None:
    if tokens.images > MAX_PICTURES:
        raise ValueError(f"images: expected at most {MAX_PICTURES} to decode, got {tokens.images}")
    for length, count in tokens.histogram.items():
        if not 1 <= length <= longest:
            raise ValueError(
                f"lengths: expected 1 to {longest} tokens, as the model makes them, got {length} in "
                f"{count} of {tokens.images} images"
            )


def show(source: Path, console: Console) -> None:
    """Print what a file holds.

    Raises:
        OSError: the file cannot be read.
        FormatError: no ``.alit`` file, or a damaged one.
    """
    with reading(source) as file:
        tokens = Reader(file)
    identity, (height, width) = tokens.identity, tokens.identity.image_size
    summary = _summary(tokens.images, tokens.tokens, tokens.size, identity.image_size)
    console.out(f"{printable(source)}: {summary}")
    console.print(
        f"written by model {identity.fingerprint.hex()[:12]}, {identity.codebook_size} codes of {identity.bits} bits, "
        f"pictures of {width}x{height}"
    )
    if tokens.images:
        table = Table("tokens", "images", "", title="lengths")
        most = max(tokens.histogram.values())
        for length, count in list(tokens.histogram.items())[:ROWS]:
            table.add_row(str(length), str(count), "#" * max(1, 40 * count // most))
        if (more := len(tokens.histogram) - ROWS) > 0:
            table.add_row("...", "", f"{more} lengths more")
        console.print(table)


def _summary(count: int, total: int, size: int, image_size: tuple[int, int]) -> str:
    if not count:
        return f"no images, {size} bytes"
    height, width = image_size
    return (
        f"{count} images, {total} tokens ({total / count:.1f} an image), {size} bytes, "
        f"{8 * size / (count * height * width):.4f} bits per pixel"
    )


def _bar(console: Console) -> ProgressBar:
    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
