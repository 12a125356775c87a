"""matplotlib without a display. Only parts of ``alit`` depend on it, so it is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .atomic_files import replacing

BLUE, ORANGE, GRAY, INK = "#1f6feb", "#d9730d", "#b8bec7", "#24292f"


def pyplot() -> Any:
    """The module ``matplotlib.pyplot``, drawing to files in the style of our plots.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRAY,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, and close it; an old file is replaced only when all is written."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot().close(figure)
