"""Run the command line in this process, and check its output."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from alit.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(done: Result) -> str:
    """Printed text of a command without line breaks."""
    return done.output.replace("\n", "")


def refused(done: Result, *messages: str) -> None:
    """Check that a command failed with status 1 and these messages, without a traceback."""
    assert done.exit_code == 1 and "Traceback" not in done.output, done.output
    assert "error: " in done.output
    assert all(message in text(done) for message in messages), done.output
