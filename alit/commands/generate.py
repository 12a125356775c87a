"""``alit generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..atomic_files import replacing
from ..console import console, counted, printable, report
from ..demo.sheet import Tile, sheet
from ..devices import choose
from ..generation import Generator, Samples, sample
from ..generation.sampling import MOST, STEPS
from ..image_records import file_name
from ..images import save_image, to_image
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer
from . import options

#: Images decoded together; images of the contact sheet, and how many of them in a row.
BATCH, SHEET, COLUMNS = 8, 64, 8
TOKENS, CONTACTS = "generated.alit", "sheet.png"


def generate(
    generator: Annotated[
        Path, typer.Argument(help="Generator: model.safetensors of a run of stage generator.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")],
    count: Annotated[
        int, typer.Option("--count", "-n", help="How many images.", min=1, max=MOST)
    ] = 16,
    of: Annotated[
        str | None,
        typer.Option(
            "--class", help="Class of all images; by default as often as in the training data."
        ),
    ] = None,
    model: options.Model = "nano",
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; below 1: likelier tokens.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens of this total probability only.")
    ] = 1.0,
    steps: Annotated[
        int, typer.Option(help="Steps per iteration of a generator that fills in masked tokens.")
    ] = STEPS,
    in_flight: Annotated[
        int, typer.Option(help="Images generated together; bounds memory.", min=1)
    ] = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that have the images' names.")
    ] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Generate images: PNG files, their tokens in one .alit file, and a contact sheet.

    GENERATOR is what alit train --stage generator leaves; the model (--model) must be the tokenizer of its tokens:

        alit generate run/model.safetensors -n 16 -o generated

        alit generate run/model.safetensors --class rose --top-p 0.95 -o roses

    An image depends on the seed and its number alone. Each has as many tokens as the generator gives it.
    """
    console.speak(quiet=quiet, as_json=as_json)
    loaded = Generator.from_pretrained(generator).to(choose(device))
    tokenizer = options.load(model, device)
    if loaded.config.identity != tokenizer.identity():
        raise ValueError(
            f"model: expected the tokenizer of the generator, {loaded.config.fingerprint[:12]}, got {model}, which is"
            f" {tokenizer.identity().fingerprint.hex()[:12]}"
        )
    output.mkdir(parents=True, exist_ok=True)
    options.check_free([output / TOKENS, output / CONTACTS], overwrite)
    report("generating", 0, count, "images")
    samples = sample(
        *(loaded, count),
        of=of,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        steps=steps,
        in_flight=in_flight,
        on_progress=lambda done: report("generating", done, count, "images"),
    )
    classes = loaded.config.classes
    names = [
        file_name(f"{classes[label]}-{number:05}" if classes else f"{number:05}")
        for number, label in enumerate(samples.labels)
    ]
    targets = [output / f"{name}.png" for name in names]
    options.check_free(targets, overwrite)
    _write(tokenizer, samples, names, targets, output)
    mean = float(samples.tokens.lengths.double().mean())
    each = zip(targets, samples.labels, samples.tokens.lengths.tolist(), strict=True)
    console.result(
        {
            "folder": str(output),
            "tokens_file": str(output / TOKENS),
            "sheet": str(output / CONTACTS),
            "tokens_per_image": mean,
            "images": [
                {
                    "file": str(target),
                    "class": classes[label] if classes else None,
                    "tokens": length,
                }
                for target, label, length in each
            ],
        },
        f"{printable(output)}: {counted(count, 'image')}, {mean:.1f} tokens on average; {TOKENS}, {CONTACTS}",
    )


def _write(
    tokenizer: AdaptiveTokenizer,
    samples: Samples,
    names: list[str],
    targets: list[Path],
    output: Path,
) -> None:
    data = samples.tokens.to_bytes(tokenizer.identity(), names=names)
    with replacing(output / TOKENS) as temporary:
        temporary.write_bytes(data)
    tokens, tiles = samples.tokens, []
    ends = tokens.offsets.tolist()
    for first in range(0, len(names), BATCH):
        last = min(first + BATCH, len(names))
        rows = tokens.rows[ends[first] : ends[last]]
        report("decoding", first, len(names), "images")
        decoded = tokenizer.decode(TokenSequence(tokens.lengths[first:last], rows))
        for number, pixels in enumerate(decoded, first):
            save_image(to_image(pixels), targets[number])
            if number < SHEET:
                caption = f"{names[number]}: {ends[number + 1] - ends[number]}"
                tiles.append(Tile(caption, pixels.cpu()))
            report("decoding", number + 1, len(names), "images")
    lines = [tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)]
    titles = ["name: tokens", *[""] * (len(lines[0]) - 1)]
    save_image(sheet(titles, lines, together=len(lines)), output / CONTACTS)
