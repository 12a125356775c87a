"""Output of the commands: results on stdout, progress and errors on stderr; and how commands fail."""

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

#: Libraries that only some commands need: module -> package, and the extra of ``alit`` that installs it.
EXTRAS = {
    "matplotlib": ("matplotlib", "demo"),
    "scipy": ("scipy", "demo"),
    "skimage": ("scikit-image", "demo"),
    **{name: (name, "export") for name in ("onnx", "onnxscript", "onnxruntime")},
    **{name: (name, "serve") for name in ("starlette", "uvicorn")},
}
#: Exit status of a command that Ctrl-C ended, as in shells.
INTERRUPTED = 130
Item = TypeVar("Item")


class Output:
    """Output of the running command, with its options ``--quiet`` and ``--json``."""

    def __init__(self) -> None:
        self.quiet = self.as_json = False
        self.display: Display | None = None
        self._console = Console()

    @contextmanager
    def command(self) -> Iterator[None]:
        """Context manager: a command runs; its progress is displayed, and its output options are at their defaults."""
        self.speak()
        self.display = Display()
        try:
            yield
        finally:
            self.display.clear()
            self.display = None

    def speak(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """Set the output options of a command: ``quiet``: errors alone; ``as_json``: results as a JSON document."""
        self.quiet, self.as_json = quiet, as_json
        if quiet:  # huggingface_hub reads it when it is imported, later
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def out(self, text: str) -> None:
        """Print a line for people, not wrapped: on stdout, with ``--json`` on stderr; nothing if quiet."""
        self._shown(lambda to: to.out(text))

    def print(self, shown: RenderableType) -> None:
        """Print a table, or text that may be wrapped, as :meth:`out`, but fitted to the terminal."""
        self._shown(lambda to: to.print(shown))

    def result(self, document: Any, *shown: RenderableType) -> None:
        """Print the result of a command: the document with ``--json``, else lines (``str``, not wrapped) and tables.

        Args:
            document: content for JSON; numbers that are not finite become null.
        """
        if self.as_json:
            self._clear()
            # ASCII with escapes, which every encoding has.
            sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
            return
        for each in shown:
            if isinstance(each, str):
                self.out(each)
            else:
                self.print(each)

    def draws(self) -> bool:
        """Clear the display; True if libraries may draw theirs: outside of commands, or on a terminal and not quiet."""
        self._clear()
        return self.display is None or (self.display.drawn and not self.quiet)

    def report(
        self, what: str, done: float = 0, total: float | None = None, unit: str = "", tell: str = ""
    ) -> None:
        """Report progress to the display, unless quiet; see :func:`report`."""
        if self.display is not None and not self.quiet:
            self.display.report(what, done, total, unit, tell)

    def error(self, text: Text) -> None:
        """Print text on stderr, even if quiet."""
        self._clear()
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)

    def _shown(self, show: Callable[[Console], None]) -> None:
        if not self.quiet:
            self._clear()
            show(Console(stderr=True) if self.as_json else self._console)

    def _clear(self) -> None:
        if self.display is not None:
            self.display.clear()


#: The output of this process's command.
console = Output()


def report(
    what: str, done: float = 0, total: float | None = None, unit: str = "", tell: str = ""
) -> None:
    """Report the progress of some work. A command displays it; outside of commands nothing happens.

    Args:
        what: the work, such as "encoding"; another one, or a smaller ``done``, begins a new bar.
        done, total: amount done, and amount in all; None: unknown.
        unit: of both, such as "images"; without it a percentage is shown.
        tell: further text to show, such as the loss.
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
    """Yield the items, and :func:`report` before the first and after each how many are done.

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
    """Name on one line: control characters, direction marks and undecodable bytes are escaped as in Python strings."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(name))


def counted(number: int, noun: str) -> str:
    """Number and noun, plural unless it is 1: ``1 image``, ``2 images``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escape_what_cannot_be_printed() -> None:
    """Make stdout and stderr write characters that their encoding lacks as escapes from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str) -> NoReturn:
    """Print an error message without a traceback and exit with status 1; its further lines are indented."""
    lines = [printable(line) for line in message.split("\n  ")]
    console.error(Text("error: " + "\n  ".join(lines), style="red"))
    raise typer.Exit(1)


def _interrupted(said: str) -> NoReturn:
    """Print ``said``, or else the work that was interrupted, and exit with status ``INTERRUPTED``."""
    display = console.display
    reason = printable(said or (display.place() if display is not None else ""))
    text = f"interrupted: {reason}" if reason else "interrupted"
    over = display is not None and display.clear()  # the bar goes, and with it the terminal's ^C
    console.error(Text(f"\n{text}" if sys.stderr.isatty() and not over else text, style="yellow"))
    raise typer.Exit(INTERRUPTED)


@contextmanager
def errors() -> Iterator[None]:
    """Context manager: bad input, missing libraries, a full GPU memory and Ctrl-C end in one line, without a traceback.

    The operating system's errors about a file read ``NAME: no such file or directory``.
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
    """Copy of a document for JSON, with None in place of NaN and infinities."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
