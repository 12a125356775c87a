"""Plots of a run as SVG, readable on white and on black. Each returns whether the run has anything to show in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from alit.atomic_files import replacing

from .runs import Row, Run, ratios

# The same results give the same files: names within them are else drawn at random.
plt.rcParams["svg.hashsalt"] = "alit"
plt.rcParams["svg.fonttype"] = "none"  # text stays text, a tenth of the size of its outlines
GREY, OURS, PEER = "#808080", "#2a9d8f", "#c97b4a"
COLOURS = ("#2a9d8f", "#c97b4a", "#7c83d1", "#c85a8a", "#8aa13a", "#4a9cc9", "#b08d2e")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    figure.patch.set_alpha(0)
    _grey(axes)
    return figure, axes


def _grey(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(
            file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
        )
    plt.close(figure)


def plot_ratios(run: Run, path: Path) -> bool:
    """One bar for each contender: how many times our time it took, on a logarithmic axis around 1."""
    entries = ratios(run)[::-1]
    if not entries:
        return False
    figure, axes = _axes(7, 0.6 + 0.2 * len(entries))
    values = [ratio for _, _, ratio in entries]
    axes.barh(
        [f"{group}: {contender}" for group, contender, _ in entries],
        [value - 1 for value in values],
        left=1,
        color=[OURS if value >= 1 else PEER for value in values],
    )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2))  # a small difference looks small
    axes.axvline(1, color=GREY, linewidth=1)
    for place, value in enumerate(values):
        text = f" {value:.0f}" if value >= 100 else f" {value:.2g}"
        axes.annotate(text, (max(value, 1), place), va="center", fontsize=7, color=GREY)
    axes.set_xlabel("time of the contender / time of ours (left of 1: the contender is faster)")
    _save(figure, path)
    return True


def plot_roofline(run: Run, path: Path) -> bool:
    """Our cases, numbered, against the machine's measured copy bandwidth and matrix-product rate."""
    copy, matmul = (run.machine["ceilings"][k] for k in ("copy_gigabytes", "matmul_gigaflops"))
    points = [r for r in run.rows if r.contender == "ours" and r.info["flops"] and r.info["bytes"]]
    if not points:
        return False
    intensities = [row.info["flops"] / row.info["bytes"] for row in points]
    figure, axes = _axes(7, 4.5)
    low, high = min([*intensities, 0.05]) / 2, max([*intensities, 2 * matmul / copy]) * 2
    roof = [low, matmul / copy, high]
    axes.plot(roof, [min(x * copy, matmul) for x in roof], color=GREY)
    for number, (row, x) in enumerate(zip(points, intensities, strict=True), 1):
        label = f"{number}  {row.group}"
        axes.scatter([x], [row.info["gigaflops"]], color=OURS, zorder=3, label=label)
        axes.annotate(
            str(number), (x, row.info["gigaflops"]), fontsize=8, color=GREY,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    _legend(axes, markerscale=0, handlelength=0, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)
    return True


def plot_tokens(run: Run, path: Path) -> bool:
    """Time and peak memory against tokens, a row of plots for each family of cases that differ in these alone."""
    families: dict[str, dict[str, list[tuple[int, Row]]]] = {}
    for row in run.rows:
        if "tokens" in row.info:
            family = row.group.replace(str(row.info["tokens"]), "N")
            lines = families.setdefault(family, {})
            lines.setdefault(row.contender, []).append((row.info["tokens"], row))
    families = {k: v for k, v in families.items() if max(map(len, v.values())) > 1}
    if not families:
        return False
    figure, grid = plt.subplots(
        len(families), 2, figsize=(9, 2.8 * len(families)), squeeze=False, layout="constrained"
    )
    for (family, lines), (time, memory) in zip(families.items(), grid, strict=True):
        for (contender, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
            tokens = [count for count, _ in points]
            style: dict[str, Any] = {
                "color": colour,
                "label": contender,
                "marker": "o",
                "markersize": 3,
            }
            time.plot(tokens, [1e3 * row.median for _, row in points], **style)
            memory.plot(tokens, [row.info["peak_megabytes"] for _, row in points], **style)
        for axes, label in ((time, "milliseconds"), (memory, "peak megabytes")):
            _grey(axes)
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
            axes.set_xlabel("N")
            axes.set_ylabel(label)
            axes.set_title(family, color=GREY, fontsize=9)
        _legend(memory, loc="upper left", bbox_to_anchor=(1, 1))
    figure.patch.set_alpha(0)
    _save(figure, path)
    return True


def plot_breakdown(run: Run, path: Path) -> bool:
    """Seconds of a training step by part, forward and backward together."""
    rows = [row for row in run.rows if row.parts][::-1]
    if not rows:
        return False
    figure, axes = _axes(7, 0.9 + 0.4 * len(rows))
    for part, colour in zip(rows[0].parts, COLOURS, strict=True):
        left = [sum(_until(row.parts, part)) for row in rows]
        axes.barh(
            [f"{row.group}: {row.contender}" for row in rows],
            [row.parts[part] for row in rows],
            *(0.6, left),
            color=colour,
            label=part,
        )
    axes.set_xlabel("seconds of one step, by part")
    _legend(axes, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(rows[0].parts))
    _save(figure, path)
    return True


def _until(parts: dict[str, float], name: str) -> list[float]:
    names = list(parts)
    return [parts[other] for other in names[: names.index(name)]]


def _legend(axes: Any, **options: Any) -> None:
    axes.legend(fontsize=7, frameon=False, labelcolor=GREY, **options)


PLOTS: dict[str, tuple[str, Callable[[Run, Path], bool]]] = {
    "ratios": ("Time of each contender over ours", plot_ratios),
    "roofline": ("Roofline", plot_roofline),
    "tokens": ("Time and memory against tokens", plot_tokens),
    "breakdown": ("Training step by part", plot_breakdown),
}
