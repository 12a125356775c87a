"""The ``alit`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import checkpoint
from .config import SIZES
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


def _fail(message: str) -> None:
    """Print the message without a traceback and leave with status 1."""
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
