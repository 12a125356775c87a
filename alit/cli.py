"""The ``alit`` command."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from . import folders, model_file, published, token_files
from .atomic_files import check_replaceable
from .config import SIZES
from .console import errors, escape_what_cannot_be_printed, fail, printable
from .criteria import CodeError, Criterion, FixedLength, MaxL1
from .devices import choose
from .images import MAX_MEGAPIXELS
from .tokenizer import AdaptiveTokenizer

#: Commands that lie elsewhere: their module, imported when they are called, and what the list of commands says of them.
ELSEWHERE = {
    "train": (
        ".training.command",
        "Train a tokenizer: on one machine as it is, on several GPUs under torchrun.",
    ),
    "evaluate": (
        ".evaluation.command",
        "L1, PSNR, SSIM and codebook usage of every length, beside a thumbnail of as many bits.",
    ),
}


class Commands(TyperGroup):
    """The commands below and those of ``ELSEWHERE``."""

    def main(self, *args: Any, **options: Any) -> Any:
        escape_what_cannot_be_printed()
        return super().main(*args, **options)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *(x for x in ELSEWHERE if x not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in ELSEWHERE and cmd_name not in self.commands:
            return TyperCommand(cmd_name, help=ELSEWHERE[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE and args[0] not in self.commands:
            module = importlib.import_module(ELSEWHERE[args[0]][0], __package__)
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            alone.command(args[0])(getattr(module, args[0]))
            self.commands[args[0]] = typer.main.get_command(alone)
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


def _show_version(asked: bool) -> None:
    if asked:
        console.out(f"alit {metadata.version('alit')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say it and leave."),
    ] = False,
) -> None:
    """An image in as few tokens as it needs: 32 when 32 will do, 256 when it takes 256.

    Begin with a photograph of your own. Nothing is downloaded, and no GPU is needed:

        alit reconstruct photo.jpg

    Then keep its tokens in a file, look at that, and make a picture of it again:

        alit encode photo.jpg -o photo.alit

        alit info photo.alit

        alit decode photo.alit -o pictures

    alit demo shows on a page what the tokenizer does. Every command explains itself: alit encode --help
    """


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


@app.command()
def reconstruct(
    photos: Photos,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "reconstructed"
    ),
    model: Model = "nano",
    max_l1: Threshold = None,
    tokens: Tokens = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside", help="Original, reconstruction and thumbnail side by side in each picture."
        ),
    ] = False,
    recursive: Recursive = True,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    device: Device = "auto",
) -> None:
    """Show photographs as the tokenizer sees them: NAME.png in a folder, and a table of what each one cost.

    The table has tokens, bits and errors of every picture (its centre square, at the model's size), and in brackets the
    errors of a thumbnail of as many bits, enlarged again: what a tokenizer has to beat.

        alit reconstruct photo.jpg

        alit reconstruct photo.jpg --tokens 64 --beside

        alit reconstruct holiday/ -o small --max-l1 0.06

    """
    with errors():
        from .reconstruct import run

        criterion = _criterion(max_l1=max_l1, tokens=tokens)
        loaded = _load(model, device)
        listing = folders.find(photos, recursive=recursive)
        options: dict[str, Any] = {"beside": beside, "max_megapixels": max_megapixels}
        run(loaded, listing, output, criterion, console=console, **options)
        _say_what_is_missing(listing)


@app.command()
def encode(
    photos: Photos,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .alit file to write.")],
    model: Model = "nano",
    max_l1: Threshold = None,
    code_error: Annotated[
        float | None, typer.Option(help="Stop at this mean error of base codes instead (faster).")
    ] = None,
    tokens: Tokens = None,
    in_flight: Annotated[
        int, typer.Option(help="Images encoded together at most; bounds memory.", min=1)
    ] = 8,
    recursive: Recursive = True,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    device: Device = "auto",
) -> None:
    """Encode pictures (centre squares) to one .alit file, each in as few tokens as it needs.

        alit encode photo.jpg -o photo.alit

        alit encode holiday/ -o holiday.alit --max-l1 0.06

        alit encode holiday/ -o holiday.alit --tokens 64

    alit decode makes pictures of the file, with the model that wrote it and no other. Files that cannot be read are
    named at the end, and the status is 1; the others are encoded all the same.
    """
    with errors():
        criterion = _criterion(max_l1=max_l1, code_error=code_error, tokens=tokens)
        loaded = _load(model, device)
        listing = folders.find(photos, recursive=recursive)
        options = (criterion, in_flight, console)
        token_files.encode(loaded, listing, output, *options, max_megapixels=max_megapixels)
        _say_what_is_missing(listing)


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(help="The .alit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    model: Model = "nano",
    device: Device = "auto",
) -> None:
    """Decode an .alit file to numbered PNG files, in the order in which the pictures were encoded.

    alit decode holiday.alit -o pictures

    """
    with errors():
        token_files.decode(_load(model, device), source, output, console)


@app.command()
def info(source: Annotated[Path, typer.Argument(help="The .alit file.")]) -> None:
    """Show what an .alit file holds: images, bits per pixel, histogram of lengths. Needs no model.

    alit info holiday.alit

    """
    with errors():
        token_files.show(source, console)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for page and pictures.")
    ] = Path("demo_output"),
    model: Model = "nano",
    max_l1: Annotated[
        float, typer.Option("--max-l1", help="Pixel error at which tokens are counted.", min=0.0)
    ] = 0.08,
    device: Device = "auto",
    train: Annotated[
        bool, typer.Option("--train", help="Train a small tokenizer live instead.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="With --train: length of the training.", min=1.0)
    ] = 150.0,
    image_size: Annotated[
        int, typer.Option(help="With --train: side of the pictures, a multiple of 16.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="With --train: seed of weights and batches.")] = 0,
) -> None:
    """Show on a page what the tokenizer does with the photographs that come with scikit-image.

    Writes index.html and its pictures: reconstructions at every length, the error against tokens beside a
    thumbnail's, tokens per photograph at one error, and where latent tokens look.

        alit demo

        alit demo -o page --max-l1 0.06

    With --train a small tokenizer, without any weights to begin with, learns a dozen of the photographs by heart:

        alit demo --train --seconds 60

    """
    with errors():
        if train:
            from .demo import live

            if model != "nano":
                raise ValueError(
                    "--model: expected none with --train, which starts without weights"
                )
            live.run(
                output,
                seconds=seconds,
                image_size=image_size,
                seed=seed,
                device=str(choose(device)),
                console=console,
            )
        else:
            from .demo import show

            show.run(_load(model, device), model, output, max_l1=max_l1, console=console)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Published checkpoint (.pth).")],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    weights: Annotated[
        str, typer.Option(help="'ema', as the published evaluation uses, or 'model'.")
    ] = "ema",
    halting: Annotated[str, typer.Option(help="'mask' for a model trained with halting.")] = "off",
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, where the size is not a published one.")
    ] = None,
) -> None:
    """Convert a published model_file. Nothing in it is executed; its training losses are dropped.

    alit convert official.pth model.safetensors

    """
    with errors():
        _check_another(source, target)
        check_replaceable(target)
        state = published.read_official(source, weights=weights)
        config = published.infer_config(state, heads=heads, halting=halting)
        AdaptiveTokenizer.from_state(config, state).save_pretrained(target)
    shape = config.encoder
    name = next(
        (name for name, size in SIZES.items() if size == (shape.width, shape.layers, shape.heads)),
        "custom size",
    )
    console.out(
        f"{printable(target)}: {name}, {config.base.kind} base, {config.bottleneck}, up to {config.max_tokens} tokens"
    )


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Model file, such as a run's model.safetensors.")],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
) -> None:
    """Store a model in 16 bits, but for what exceeds them: half the size, for passing on. Models are float32 again when
    they are loaded.

    alit export run/model.safetensors small.safetensors

    """
    with errors():
        _check_another(Path(source), target)
        model = AdaptiveTokenizer.from_pretrained(source)
        model_file.write(target, model.config, model_file.halved(model.state_dict()))
    console.out(f"{printable(target)}: {target.stat().st_size / 1e6:.1f} MB")


def _check_another(source: Path, target: Path) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"target: {target} is the source; choose another file")


def _criterion(
    *, max_l1: float | None, tokens: int | None, code_error: float | None = None
) -> Criterion:
    given: list[Criterion] = [
        *([MaxL1(max_l1)] if max_l1 is not None else []),
        *([CodeError(code_error)] if code_error is not None else []),
        *([FixedLength(tokens)] if tokens is not None else []),
    ]
    if len(given) > 1:
        raise ValueError("expected one of --max-l1, --code-error and --tokens, got several")
    return given[0] if given else MaxL1(0.08)


def _load(model: str, device: str) -> AdaptiveTokenizer:
    return AdaptiveTokenizer.from_pretrained(model).to(choose(device))


def _say_what_is_missing(listing: folders.Listing) -> None:
    """Files in folders that are no pictures, and those that were skipped, for which the status is 1."""
    if beside := listing.beside():
        console.out(beside)
    if skipped := listing.skipped():
        fail(skipped)


if __name__ == "__main__":
    app()
