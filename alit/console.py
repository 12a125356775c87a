"""What the commands print, and how they fail."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

#: Libraries that only some commands need: module, and what to install.
EXTRAS = {"matplotlib": ("matplotlib", "demo"), "skimage": ("scikit-image", "demo")}


def printable(name: object) -> str:
    """A name on one line: controls, marks of direction and bytes that are no text as Python writes them in strings."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(name))


def escape_what_cannot_be_printed() -> None:
    """From now on standard output and error show characters that their encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str) -> NoReturn:
    """Print the message without a traceback and leave with status 1; further lines of it are indented."""
    lines = [printable(line) for line in message.split("\n  ")]
    text = Text("error: " + "\n  ".join(lines), style="red")
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def errors(*others: type[Exception]) -> Iterator[None]:
    """Bad input, and ``others``, become one line, without a traceback."""
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *others)
    try:
        yield
    except typer.Exit:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        name, extra = EXTRAS[package]
        fail(f"this needs {name}: pip install 'alit[{extra}]'")
    except expected as error:
        fail(str(error))
