"""The ``alit`` command line: the list of commands. Each lies in ``commands``, in a file of its name."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .console import console, errors, escape_what_cannot_be_printed

#: Help line of each command, by its group in the list; a command's module is imported when it is called.
GROUPS = {
    "Tokens": {
        "encode": "Encode images to one .alit file, each in as few tokens as it needs.",
        "decode": "Decode an .alit file to PNG files with the names and sizes of the images that were encoded.",
        "info": "Show what an .alit file holds: images, bits per pixel, lengths, names and sizes. Needs no model.",
        "reconstruct": "Show photographs as the tokenizer sees them: NAME.png in a folder, and a table of what each"
        " cost.",
        "serve": "Play with an image in a browser: a slider over its tokens, what they keep, and where they look.",
        "demo": "Show on a page what the tokenizer does with the photographs that come with scikit-image.",
    },
    "Models": {
        "train": "Train a tokenizer: on one machine as it is, on several GPUs under torchrun.",
        "evaluate": "Measure L1, PSNR, SSIM and codebook usage at every length, beside a thumbnail of as many bits.",
        "analyze": "Show on a page what the number of tokens depends on, and what tokens know of an image.",
        "probe": "Classify images by their tokens: linear classifiers at every length, beside controls.",
        "generate": "Generate images: PNG files, their tokens in one .alit file, and a contact sheet.",
    },
    "Model files": {
        "compact": "Store a model in 16 bits, but for what exceeds them: half the size, for passing on.",
        "convert": "Convert a published checkpoint. Nothing in it is executed; its training losses are dropped.",
        "export": "Write encoder and decoder as programs that need no alit: torch.export, ONNX or AOTI.",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


class Commands(TyperGroup):
    """Group of the commands in ``GROUPS``, all of which report errors in the same way (:func:`errors`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name, help=text, rich_help_panel=group)
            for group, texts in GROUPS.items()
            for name, text in texts.items()
        }

    def main(self, *args: Any, **options: Any) -> Any:
        escape_what_cannot_be_printed()
        return super().main(*args, **options)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve a command by name, and import its module: name, the callable command, remaining arguments."""
        name, listed, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, listed, rest
        module = importlib.import_module(f".commands.{name}", __package__)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(name)(getattr(module, name))
        return name, typer.main.get_command(alone), rest

    def invoke(self, ctx: Any) -> Any:
        with console.command(), errors():
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        console.out(f"alit {metadata.version('alit')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """An image in as few tokens as it needs: 32 when 32 will do, 256 when it takes 256.

    Begin with a photograph of your own. Nothing is downloaded, and no GPU is needed:

        alit reconstruct photo.jpg

    Then keep its tokens in a file, look at that, and make an image of it again:

        alit encode photo.jpg -o photo.alit

        alit info photo.alit

        alit decode photo.alit -o images

    alit demo shows on a page what the tokenizer does. Every command explains itself: alit encode --help
    """


if __name__ == "__main__":
    app()
