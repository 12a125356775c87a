"""Plots of a run, readable on white and on black. Each function returns None if the run has nothing to show in it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alit.atomic_files import replacing

from .runs import Row, Run, ratios

GRAY, OURS, PEER = "#808080", "#2a9d8f", "#c97b4a"
COLORS = ("#2a9d8f", "#c97b4a", "#7c83d1", "#c85a8a", "#8aa13a", "#4a9cc9", "#b08d2e")
COLORED = ("xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor")
plt.rcParams.update(dict.fromkeys((*COLORED, "legend.labelcolor"), GRAY))
plt.rcParams.update({"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.titlesize": 9})
plt.rcParams.update({"legend.fontsize": 7, "legend.frameon": False})
# Ids within an SVG are made from a fixed salt, so that the same results give the same files. Text is kept as text, a
# tenth of the size of its outlines, in one font.
plt.rcParams.update(
    {"svg.hashsalt": "alit", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
)
#: Parts of an SVG without visible effect: third and later decimals of coordinates, comments, indentation, ids,
#: rotations by zero.
UNSEEN = re.compile(
    r'(?<=\d\.\d\d)\d+(?=[^<>]*>)|\s*<!--.*?-->|(?<=\n) +| id="\w+_\d+"| transform="rotate\(-0 [^"]*"'
)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG to ``path``, without parts that have no visible effect, and close it."""
    text, unsaid = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata=unsaid)
    plt.close(figure)
    with replacing(path) as file:
        file.write_text(UNSEEN.sub("", text.getvalue()))


def plot_ratios(run: Run) -> Figure | None:
    """Bar chart of each contender's time over ours, on a logarithmic axis around 1."""
    entries = ratios(run)[::-1]
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.2 * len(entries)))
    values = np.array([ratio for _, _, ratio in entries])
    places = np.arange(len(values))
    for color, some in ((OURS, values >= 1), (PEER, values < 1)):
        axes.hlines(places[some], 1, values[some], colors=color, linewidths=8)
    names = [f"{group}: {contender}" for group, contender, _ in entries]
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", left=False)
    axes.set_ylim(-1, len(values))
    axes.set_xscale("log")
    # The axis spans at least 0.5 to 2, so that small differences look small.
    axes.set_xlim(min(values.min() / 1.2, 0.5), max(values.max() * 1.2, 2))
    axes.minorticks_off()
    axes.axvline(1, color=GRAY, linewidth=1)
    for place, value in zip(places, values, strict=True):
        text = f" {value:.0f}" if value >= 100 else f" {value:.2g}"
        axes.annotate(text, (max(value, 1), place), va="center", fontsize=7, color=GRAY)
    axes.set_xlabel("time of the contender / time of ours (left of 1: the contender is faster)")
    return figure


def plot_roofline(run: Run) -> Figure | None:
    """Roofline plot: our cases, numbered, against the measured copy bandwidth and matrix-product rate."""
    copy, matmul = (run.machine["ceilings"][k] for k in ("copy_gigabytes", "matmul_gigaflops"))
    points = [r for r in run.rows if r.contender == "ours" and r.info["flops"] and r.info["bytes"]]
    if not points:
        return None
    intensities = [row.info["flops"] / row.info["bytes"] for row in points]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    low, high = min([*intensities, 0.05]) / 2, max([*intensities, 2 * matmul / copy]) * 2
    roof = [low, matmul / copy, high]
    axes.plot(roof, [min(x * copy, matmul) for x in roof], color=GRAY)
    for number, (row, x) in enumerate(zip(points, intensities, strict=True), 1):
        label = f"{number}  {row.group}"
        axes.scatter([x], [row.gigaflops], color=OURS, zorder=3, label=label)
        axes.annotate(
            str(number), (x, row.gigaflops), fontsize=8, color=GRAY,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="operations per byte that must move", ylabel="GFLOP/s")
    axes.minorticks_off()
    axes.legend(markerscale=0, handlelength=0, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_tokens(run: Run) -> Figure | None:
    """Plots of time and peak memory against tokens, a row for each family of cases that differ only in tokens."""
    families: dict[str, dict[str, list[tuple[int, Row]]]] = {}
    for row in run.rows:
        if "tokens" in row.info:
            family = row.group.replace(str(row.info["tokens"]), "N")
            lines = families.setdefault(family, {})
            lines.setdefault(row.contender, []).append((row.info["tokens"], row))
    families = {k: v for k, v in families.items() if max(map(len, v.values())) > 1}
    if not families:
        return None
    figure, grid = plt.subplots(
        len(families), 2, figsize=(9, 2.8 * len(families)), squeeze=False, layout="constrained"
    )
    for (family, lines), panels in zip(families.items(), grid, strict=True):
        for (contender, points), color in zip(lines.items(), COLORS * len(lines), strict=False):
            tokens = [count for count, _ in points]
            style: dict[str, Any] = {"color": color, "label": contender}
            style |= {"marker": "o", "markersize": 3}
            panels[0].plot(tokens, [1e3 * row.median for _, row in points], **style)
            panels[1].plot(tokens, [row.info["peak_megabytes"] for _, row in points], **style)
        for axes, label in zip(panels, ("milliseconds", "peak megabytes"), strict=True):
            axes.set(title=family, xlabel="N", ylabel=label, ylim=(0, 1.05 * axes.dataLim.y1))
        panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_breakdown(run: Run) -> Figure | None:
    """Stacked bars of a training step's seconds by part, forward and backward together."""
    rows = [row for row in run.rows if row.parts][::-1]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.4 * len(rows)))
    names, left = [f"{row.group}: {row.contender}" for row in rows], np.zeros(len(rows))
    for part, color in zip(rows[0].parts, COLORS, strict=True):
        seconds = np.array([row.parts[part] for row in rows])
        axes.barh(names, seconds, 0.6, left, color=color, label=part)
        left += seconds
    axes.set_xlabel("seconds of one step, by part")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(rows[0].parts))
    return figure


PLOTS: dict[str, tuple[str, Callable[[Run], Figure | None]]] = {
    "ratios": ("Time of each contender over ours", plot_ratios),
    "roofline": ("Roofline", plot_roofline),
    "tokens": ("Time and memory against tokens", plot_tokens),
    "breakdown": ("Training step by part", plot_breakdown),
}
