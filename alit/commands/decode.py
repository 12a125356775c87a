"""``alit decode``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..alit_format import Reader
from ..atomic_files import reading
from ..config import AdaptiveTokenizerConfig
from ..console import console, counted, printable, report
from ..fitting import restored
from ..folders import distinct
from ..image_records import ImageInfo
from ..images import MAX_MEGAPIXELS, save_image
from ..sequence import TokenSequence
from ..sizes import check_size
from ..tokenizer import AdaptiveTokenizer
from . import options

#: Images decoded together.
BATCH = 8
#: Most images that ``00000.png`` and so on name in order.
MAX_IMAGES = 100_000
#: Largest side of an image that is resized to its original; a filter takes 40 bytes for each row and column.
MAX_SIDE = 2**20
#: Most bytes of a name, before a number and ``.png``: file systems take 255.
MAX_STEM = 240


def decode(
    source: Annotated[Path, typer.Argument(help="The .alit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")],
    model: options.Model = "nano",
    encoded_size: Annotated[
        bool,
        typer.Option("--encoded-size", help="As large as they were encoded, not as the originals."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that have the images' names.")
    ] = False,
    max_megapixels: Annotated[
        float, typer.Option(help="Refuse files with larger originals.", min=0.0)
    ] = MAX_MEGAPIXELS,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Decode an .alit file to PNG files with the names and sizes of the images that were encoded.

    Images of one name get numbers, those without a name their place in the file. The model (--model) must be the one
    that wrote the file:

        alit decode holiday.alit -o images

    A folder in which a file of such a name lies already is refused (but for --overwrite), and so is one that holds
    more numbered images, of another file.
    """
    console.speak(quiet=quiet, as_json=as_json)
    loaded = options.load(model, device)
    with reading(source) as file, options.naming(source):
        tokens = Reader(file)
        tokens.expect(loaded.identity())
        _check_counts(tokens, loaded.config.max_tokens)
        images = tokens.images(0, tokens.image_count)
        if encoded_size:
            images.originals[:] = 0
        _check_sizes(images, loaded.config, max_megapixels)
        targets = _targets(images, output, overwrite)
        output.mkdir(parents=True, exist_ok=True)
        counts = _write_images(loaded, tokens, images, targets)
    each = zip(targets, images.names, counts, strict=True)
    console.result(
        {
            "folder": str(output),
            "images": [
                {"file": str(target), "name": name or None, "tokens": count}
                for target, name, count in each
            ],
        },
        f"{printable(output)}: {counted(tokens.image_count, 'image')}",
    )


def _check_counts(tokens: Reader, longest: int) -> None:
    """Check that the model can decode all images; raises ``ValueError``."""
    if tokens.image_count > MAX_IMAGES:
        raise ValueError(
            f"images: expected at most {MAX_IMAGES} to decode, got {tokens.image_count}"
        )
    for length, count in tokens.histogram.items():
        if not 1 <= length <= longest:
            raise ValueError(
                f"lengths: expected 1 to {longest} tokens, as the model makes them, got {length} in "
                f"{count} of {tokens.image_count} images"
            )


def _check_sizes(images: ImageInfo, config: AdaptiveTokenizerConfig, max_megapixels: float) -> None:
    """Check that the model makes images of these sizes, and that originals are not too large; raises ``ValueError``."""
    for height, width in set(map(tuple, images.sizes.tolist())):
        check_size(config, height, width, "size")
    for size in set(map(tuple, images.originals.tolist())):
        if math.prod(size) > max_megapixels * 1e6 or max(size) > MAX_SIDE:
            raise ValueError(
                f"original: expected at most {max_megapixels:g} megapixels and sides of at most {MAX_SIDE} pixels, got "
                f"{size[1]} x {size[0]}; --encoded-size decodes it all the same"
            )


def _targets(images: ImageInfo, output: Path, overwrite: bool) -> list[Path]:
    """Path of a file of its own, within ``output``, for each image; refuses another file's images.

    Raises:
        ValueError: a file that is there already, or more numbered images, of another ``.alit`` file.
    """
    numbered = [not name for name in images.names]
    stems = [
        Path(name).stem.encode()[:MAX_STEM].decode(errors="ignore") or f"{b:05}"
        for b, name in enumerate(images.names)
    ]
    targets = [output / f"{name}.png" for name in distinct(stems)]
    if all(numbered):
        there = [int(x.stem) for x in output.glob("[0-9]" * 5 + "*.png") if x.stem.isdecimal()]
        if max(there, default=-1) >= len(targets):
            raise ValueError(
                f"output: {output} holds more images, of another file; choose another folder"
            )
    else:
        options.check_free(targets, overwrite)
    return targets


def _write_images(
    model: AdaptiveTokenizer, tokens: Reader, images: ImageInfo, targets: list[Path]
) -> list[int]:
    """Decode all images and write them to ``targets``; returns the number of tokens of each."""
    done, counts = 0, []
    for first in range(0, tokens.image_count, BATCH):
        lengths = tokens.lengths(first, min(BATCH, tokens.image_count - first))
        indices = tokens.indices(done, int(lengths.sum()))
        sizes = images.sizes[first : first + len(lengths)].copy()
        batch = TokenSequence(
            torch.from_numpy(lengths),
            indices=torch.from_numpy(indices),
            sizes=torch.from_numpy(sizes),
        )
        report("decoding", first, tokens.image_count, "images")
        for b, pixels in enumerate(model.decode(batch), first):
            padding, original = (tuple(x[b].tolist()) for x in images[2:0:-1])
            save_image(restored(pixels, padding, original), targets[b])
            report("decoding", b + 1, tokens.image_count, "images")
        done += len(indices)
        counts += lengths.tolist()
    return counts
