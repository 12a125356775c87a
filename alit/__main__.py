"""``python -m alit``: the command line."""

from .cli import app

app()
