"""What the commands print, and how they fail: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from .display import Display

#: Libraries that only some commands need: module, and what to install.
EXTRAS = {
    "matplotlib": ("matplotlib", "demo"),
    "scipy": ("scipy", "demo"),
    "skimage": ("scikit-image", "demo"),
    **{name: (name, "export") for name in ("onnx", "onnxscript", "onnxruntime")},
    **{name: (name, "serve") for name in ("starlette", "uvicorn")},
}
#: Of a command that Ctrl-C ended, as shells have it.
INTERRUPTED = 130
Item = TypeVar("Item")


class Output:
    """Where the running command prints, and what was asked of it."""

    def __init__(self) -> None:
        self.quiet = self.as_json = False
        self.display: Display | None = None
        self._console = Console()

    @contextmanager
    def command(self) -> Iterator[None]:
        """While it runs, what is reported is shown; nothing is asked of its output yet."""
        self.speak()
        self.display = Display()
        try:
            yield
        finally:
            self.display.clear()
            self.display = None

    def speak(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """What the options of a command say: errors alone; results as a document for programs."""
        self.quiet, self.as_json = quiet, as_json
        if quiet:  # read when the package is first imported, which is later
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def out(self, text: str) -> None:
        """A line for people, however long: on stdout, but with ``--json`` on stderr."""
        self._shown(lambda to: to.out(text))

    def print(self, shown: RenderableType) -> None:
        """As :meth:`out`, but fitted to the terminal: a table, or text that may be broken into lines."""
        self._shown(lambda to: to.print(shown))

    def result(self, document: Any, *shown: RenderableType) -> None:
        """What a command found: the document with ``--json``, else lines (``str``, not broken) and tables.

        Args:
            document: what JSON takes; numbers that are not finite become null.
        """
        if self.as_json:
            self._clear()
            # Escapes alone, which every encoding has.
            sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
            return
        for each in shown:
            if isinstance(each, str):
                self.out(each)
            else:
                self.print(each)

    def draws(self) -> bool:
        """Whether other libraries may draw how far they are, as outside of commands; what is drawn goes away."""
        self._clear()
        return self.display is None or (self.display.drawn and not self.quiet)

    def report(
        self, what: str, done: float = 0, total: float | None = None, unit: str = "", tell: str = ""
    ) -> None:
        """See :func:`report`."""
        if self.display is not None and not self.quiet:
            self.display.report(what, done, total, unit, tell)

    def error(self, text: Text) -> None:
        """A line, or several, on stderr, whatever was asked."""
        self._clear()
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)

    def _shown(self, show: Callable[[Console], None]) -> None:
        if not self.quiet:
            self._clear()
            show(Console(stderr=True) if self.as_json else self._console)

    def _clear(self) -> None:
        if self.display is not None:
            self.display.clear()


#: Where commands print.
console = Output()


def report(
    what: str, done: float = 0, total: float | None = None, unit: str = "", tell: str = ""
) -> None:
    """Say how far some work is. A command shows it; outside of one nothing happens.

    Args:
        what: what is being done, such as "encoding"; another one, or less that is done, begins anew.
        done, total: of it; None: nobody knows.
        unit: of what, such as "images"; without it a percentage is shown.
        tell: more to say, such as the loss.
    """
    console.report(what, done, total, unit, tell)


def reported(
    items: Iterable[Item],
    what: str,
    total: float | None = None,
    unit: str = "images",
    *,
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """The items; before the first and behind each of them :func:`report` says how many there were.

    Args:
        size: how many an item counts as: ``len`` for batches.
    """
    done = 0
    report(what, done, total, unit)
    for item in items:
        yield item
        done += size(item)
        report(what, done, total, unit)


def printable(name: object) -> str:
    """A name on one line: controls, marks of direction and bytes that are no text as Python writes them in strings."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(name))


def counted(number: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escape_what_cannot_be_printed() -> None:
    """From now on standard output and error show characters that their encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str) -> NoReturn:
    """Print the message without a traceback and leave with status 1; further lines of it are indented."""
    lines = [printable(line) for line in message.split("\n  ")]
    console.error(Text("error: " + "\n  ".join(lines), style="red"))
    raise typer.Exit(1)


def _interrupted(said: str) -> NoReturn:
    """Print what was being done, or ``said``, and leave as programs do that Ctrl-C ended."""
    display = console.display
    reason = printable(said or (display.place() if display is not None else ""))
    text = f"interrupted: {reason}" if reason else "interrupted"
    over = display is not None and display.clear()  # and with the bar the terminal's ^C
    console.error(Text(f"\n{text}" if sys.stderr.isatty() and not over else text, style="yellow"))
    raise typer.Exit(INTERRUPTED)


@contextmanager
def errors() -> Iterator[None]:
    """Bad input, missing libraries, a GPU's memory that is full and Ctrl-C become one line, without a traceback.

    What the system says of a file becomes ``NAME: no such file or directory``.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        _interrupted(str(error))
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


def _finite(content: Any) -> Any:
    """What JSON can hold: null in place of NaN and infinities."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
