"""What the commands print, and how they fail."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Where commands print.
console = Console()
#: Libraries that only some commands need: module, and what to install.
EXTRAS = {
    "matplotlib": ("matplotlib", "demo"),
    "scipy": ("scipy", "demo"),
    "skimage": ("scikit-image", "demo"),
    **{name: (name, "export") for name in ("onnx", "onnxscript", "onnxruntime")},
    **{name: (name, "serve") for name in ("starlette", "uvicorn")},
}


def printable(name: object) -> str:
    """A name on one line: controls, marks of direction and bytes that are no text as Python writes them in strings."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(name))


def counted(number: int, noun: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
def errors() -> Iterator[None]:
    """Bad input, missing libraries and a GPU's memory that is full become one line, without a traceback.

    What the system says of a file becomes ``NAME: no such file or directory``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        name, extra = EXTRAS[package]
        fail(f"this needs {name}: pip install 'alit[{extra}]'")
    except BrokenPipeError:  # whoever read the output has gone; typer leaves silently
        raise
    except OSError as error:
        reason = error.strerror or ""  # an HTTPError has none
        known = error.filename is not None and reason
        fail(f"{error.filename}: {reason[0].lower()}{reason[1:]}" if known else str(error))
    except ValueError as error:
        fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every command imports
            raise
        fail(str(error))


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, str], None]]:
    """A bar while the block runs, which calls with the share that is done, and with text to stand beside the bar."""
    columns = TextColumn(what), BarColumn(), TextColumn("{task.fields[detail]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=1.0, detail="")

        def advance(done: float, detail: str) -> None:
            bar.update(task, completed=min(done, 1.0), detail=detail)

        yield advance
