"""``alit demo``: a page about what a model does with the photographs that come with scikit-image."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ..atomic_files import replacing
from ..console import printable
from ..tokenizer import AdaptiveTokenizer
from . import figures
from .measure import measure
from .page import page
from .photographs import photographs


def run(
    model: AdaptiveTokenizer, name: str, output: Path, *, max_l1: float, console: Console
) -> None:
    """Write ``index.html``, ``reconstructions.png``, ``error.png``, ``tokens.png`` and ``attention.png`` to ``output``.

    Args:
        name: of the model, for the page.
        max_l1: the error at which tokens are counted.

    Raises:
        ModuleNotFoundError: matplotlib or scikit-image is not installed.
        ValueError: a model whose pictures are not square.
        OSError: ``output`` cannot be written.
    """
    start = time.monotonic()
    height, width = model.config.image_size
    if height != width:
        raise ValueError(f"model: expected one of square pictures, got {width}x{height}")
    figures.pyplot()  # a missing library is reported before any work
    photos = photographs(height)
    output.mkdir(parents=True, exist_ok=True)
    with console.status("encoding and decoding photographs") as status:
        measured = measure(model, photos, max_l1=max_l1)
        for figure in (figures.reconstructions, figures.error, figures.tokens, figures.attention):
            status.update(f"drawing {figure.__name__}.png")
            figure(measured, output / f"{figure.__name__}.png")
        with replacing(output / "index.html") as file:
            file.write_text(page(model, printable(name), measured), encoding="utf-8")
    seconds = time.monotonic() - start
    index = printable((output / "index.html").resolve())
    console.out(f"{index}: open it in a browser; {seconds:.0f} s")
