"""Charts as SVG, in the colors of the page, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import NamedTuple

from ..demo.figures import spread
from .statistics import Interval

WIDTH, LINE = 720, 30
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 12, 44


class Series(NamedTuple):
    """Line of a chart: its values, and the name at its end; ``color`` is a CSS custom property of the page."""

    name: str
    values: Sequence[float]
    color: str = "--soft"
    dashed: bool = False


def lines(xs: Sequence[float], series: Sequence[Series], *, x: str, y: str) -> str:
    """SVG line chart of series over the same ``xs``; the vertical axis starts at 0."""
    height = 360
    top = max(value for each in series for value in each.values) or 1.0
    first, last = min(xs), max(xs) if len(xs) > 1 else min(xs) + 1

    def place(at: float, value: float) -> tuple[float, float]:
        across = LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, height - BOTTOM - value / (1.05 * top) * (height - TOP - BOTTOM)

    parts = []
    for tick in ticks(0, top):
        _, at = place(first, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(LEFT - 8, at + 4, f"{tick:g}", "end"))
    for at in xs:
        parts.append(_text(place(at, 0)[0], height - BOTTOM + 18, f"{at:g}", "middle"))
    names = []
    for each in series:
        points = [place(*pair) for pair in zip(xs, each.values, strict=True)]
        style = f"stroke: var({each.color})" + ("; stroke-dasharray: 5 4" if each.dashed else "")
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line" style="{style}" points="{path}"/>')
        parts += [
            f'<circle r="3" cx="{a:.1f}" cy="{b:.1f}" style="fill: var({each.color})"/>'
            for a, b in points
        ]
        names.append((points[-1][1], each))
    heights = spread([y for y, _ in names], gap=16)
    down = max(0.0, TOP - min(heights))  # names that would stand above the chart
    for at, (_, each) in zip([y + down for y in heights], names, strict=True):
        style = f"fill: var({each.color})"
        parts.append(_text(WIDTH - RIGHT + 10, at + 4, each.name, "start", style))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x, "middle"))
    parts.append(
        f'<text text-anchor="middle" transform="translate(14 {height / 2 - 10:.0f}) rotate(-90)">{escape(y)}</text>'
    )
    return _svg(height, parts, f"{y} against {x}")


def forest(rows: Sequence[tuple[str, Interval, str]], *, x: str) -> str:
    """SVG forest plot of rows (name, interval, color): a dot and its interval each, around a line at 0."""
    known = [v for _, its, _ in rows for v in (its.low, its.high, its.value) if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    high = high if high > low else low + 1
    left, height = 240, LINE * len(rows) + TOP + BOTTOM

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - 70)

    bottom = height - BOTTOM
    parts = []
    for tick in ticks(low, high):
        kind, at = ("zero" if tick == 0 else "grid"), across(tick)
        parts.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(at, bottom + 18, f"{tick:g}", "middle"))
    for number, (name, its, color) in enumerate(rows):
        y = TOP + LINE * (number + 0.5)
        parts.append(_text(left - 12, y + 5, name, "end", "fill: var(--ink)"))
        if its.value is None or its.low is None or its.high is None:
            parts.append(_text(across(0) + 8, y + 5, "undefined", "start"))
            continue
        a, b = across(its.low), across(its.high)
        style = f"var({color})"
        parts.append(
            f'<line class="line" style="stroke: {style}" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle r="5" cx="{across(its.value):.1f}" cy="{y}" style="fill: {style}"/>'
        )
        parts.append(_text(WIDTH - 8, y + 5, f"{its.value:.3f}".replace("-", "\u2212"), "end"))
    parts.append(_text((left + WIDTH - 70) / 2, height - 6, x, "middle"))
    return _svg(height, parts, x)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    raw = (high - low) / 5
    unit = 10.0 ** floor(log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first, last = floor(low / step), floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1) if n * step >= low - 1e-9 * step]


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    styled = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{styled}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
