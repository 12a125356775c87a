"""``alit decode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..alit_format import Reader
from ..atomic_files import reading
from ..console import console, counted, printable, progress
from ..images import save_image, to_image
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from . import options

#: Images decoded together.
BATCH = 8
#: That ``00000.png`` and so on name in order.
MAX_PICTURES = 100_000


def decode(
    source: Annotated[Path, typer.Argument(help="The .alit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    model: options.Model = "nano",
    device: options.Device = "auto",
) -> None:
    """Decode an .alit file to numbered PNG files, in the order in which the pictures were encoded.

    The model (--model) must be the one that wrote the file:

        alit decode holiday.alit -o pictures

    A folder that holds more pictures, of another file, is refused.
    """
    loaded = options.load(model, device)
    with reading(source) as file:
        tokens = Reader(file)
        tokens.expect(loaded.identity())
        _check(tokens, loaded.config.max_tokens, output)
        output.mkdir(parents=True, exist_ok=True)
        _write_pictures(loaded, tokens, output)
    console.out(f"{printable(output)}: {counted(tokens.image_count, 'picture')}")


def _check(tokens: Reader, longest: int, output: Path) -> None:
    """That the model can decode all, and that no pictures of another file would seem to belong to this one."""
    if tokens.image_count > MAX_PICTURES:
        raise ValueError(
            f"images: expected at most {MAX_PICTURES} to decode, got {tokens.image_count}"
        )
    for length, count in tokens.histogram.items():
        if not 1 <= length <= longest:
            raise ValueError(
                f"lengths: expected 1 to {longest} tokens, as the model makes them, got {length} in "
                f"{count} of {tokens.image_count} images"
            )
    numbers = [int(x.stem) for x in output.glob("[0-9]" * 5 + "*.png") if x.stem.isdecimal()]
    if max(numbers, default=-1) >= tokens.image_count:
        raise ValueError(
            f"output: {output} holds more pictures, of another file; choose another folder"
        )


def _write_pictures(model: AdaptiveTokenizer, tokens: Reader, output: Path) -> None:
    done = 0
    with progress("decoding") as advance:
        for first in range(0, tokens.image_count, BATCH):
            lengths = tokens.lengths(first, min(BATCH, tokens.image_count - first))
            indices = tokens.indices(done, int(lengths.sum()))
            batch = TokenSequence(torch.from_numpy(lengths), torch.from_numpy(indices))
            for b, pixels in enumerate(model.decode(batch), first):
                save_image(to_image(pixels), output / f"{b:05}.png")
            done += len(indices)
            seen = first + len(lengths)
            advance(seen / tokens.image_count, f"{seen}/{tokens.image_count}")
