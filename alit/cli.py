"""The ``alit`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from . import checkpoint, token_files
from .config import SIZES
from .criteria import CodeError, Criterion, FixedLength, MaxL1
from .evaluation.command import evaluate
from .tokenizer import AdaptiveTokenizer
from .training.command import train

app = typer.Typer(
    help="Adaptive-length image tokenization.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command()(train)
app.command()(evaluate)
console = Console()


@app.callback()
def main() -> None:
    """An image in as few tokens as it needs."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("demo_output"),
    seconds: Annotated[float, typer.Option(help="Length of the training.", min=1.0)] = 150.0,
    image_size: Annotated[
        int, typer.Option(help="Side of the pictures in pixels, a multiple of 16.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
) -> None:
    """Train a small tokenizer live on scikit-image's photographs and show what it does with eight lengths."""
    try:
        from .demo import run
    except ModuleNotFoundError as error:
        _fail(f"the demo needs {error.name}: pip install 'alit[demo]'")
    try:
        run(output, seconds=seconds, image_size=image_size, seed=seed, console=console)
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Published checkpoint (.pth).", exists=True, dir_okay=False)
    ],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
    weights: Annotated[
        str, typer.Option(help="'ema', as the published evaluation uses, or 'model'.")
    ] = "ema",
    halting: Annotated[str, typer.Option(help="'mask' for a model trained with halting.")] = "off",
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, where the size is not a published one.")
    ] = None,
) -> None:
    """Convert a published checkpoint. Nothing in it is executed; its training losses are dropped."""
    try:
        state = checkpoint.read_official(source, weights=weights)
        config = checkpoint.infer_config(state, heads=heads, halting=halting)
        model = AdaptiveTokenizer(config)
        checkpoint.load_state(model, state)
        model.save_pretrained(target)
    except (OSError, ValueError) as error:
        _fail(str(error))
    shape = config.encoder
    name = next(
        (name for name, size in SIZES.items() if size == (shape.width, shape.layers, shape.heads)),
        "custom size",
    )
    console.print(
        f"{target}: {name}, {config.base.kind} base, {config.bottleneck}, up to {config.max_tokens} tokens"
    )


Model = Annotated[
    str | None,
    typer.Option(help="Safetensors file or name of shipped weights; by default the shipped ones."),
]


@app.command()
def encode(
    photos: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .alit file to write.")],
    model: Model = None,
    max_l1: Annotated[
        float | None, typer.Option(help="Stop at this mean pixel error; 0.05 by default.")
    ] = None,
    code_error: Annotated[
        float | None, typer.Option(help="Stop at this mean error of base codes instead (faster).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="A fixed number of tokens instead.")] = None,
    in_flight: Annotated[
        int, typer.Option(help="Images encoded together at most; bounds memory.", min=1)
    ] = 8,
) -> None:
    """Encode pictures (centre crops) to one .alit file, each in as few tokens as it needs."""
    criteria: list[Criterion] = [
        *([MaxL1(max_l1)] if max_l1 is not None else []),
        *([CodeError(code_error)] if code_error is not None else []),
        *([FixedLength(tokens)] if tokens is not None else []),
    ]
    if len(criteria) > 1:
        _fail("expected one of --max-l1, --code-error and --tokens, got several")
    criterion = criteria[0] if criteria else MaxL1(0.05)
    try:
        token_files.encode(_load(model), photos, output, criterion, in_flight, console)
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(help="The .alit file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    model: Model = None,
) -> None:
    """Decode an .alit file to numbered PNG files, in the order in which the pictures were encoded."""
    try:
        token_files.decode(_load(model), source, output, console)
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command()
def info(source: Annotated[Path, typer.Argument(help="The .alit file.")]) -> None:
    """Show what an .alit file holds: images, bits per pixel, histogram of lengths. Needs no model."""
    try:
        token_files.show(source, console)
    except (OSError, ValueError) as error:
        _fail(str(error))


def _load(model: str | None) -> AdaptiveTokenizer:
    if model is None:
        shipped = sorted(file.stem for file in checkpoint.SHIPPED.glob("*.safetensors"))
        if len(shipped) != 1:
            _fail(f"state --model; shipped weights: {', '.join(shipped) or 'none yet'}")
        model = shipped[0]
    return AdaptiveTokenizer.from_pretrained(model)


def _fail(message: str) -> NoReturn:
    """Print the message without a traceback and leave with status 1."""
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
