"""``index.html``: the images, the numbers, and what the model is and is not."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

from ..tokenizer import AdaptiveTokenizer
from .measure import Measured

UNKNOWN = "What this model has been trained on, and how well it does on images new to it, this page does not know."
#: Descriptions of shipped weights, by name.
ABOUT = {
    "nano": "nano is small, and was trained by this project on a processor alone, on 900 photographs, none of them"
    " among these. Its images keep places and colors, and lose what is fine. Its terms and"
    " its measured quality are in alit/weights/README.md."
}


def page(model: AdaptiveTokenizer, name: str, measured: Measured) -> str:
    """HTML page of the demo; its images lie beside it, and it needs nothing else."""
    config, lengths = model.config, measured.lengths
    (height, width), (down, across) = config.image_size, config.grid
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    met = measured.tokens[measured.reached].tolist()
    facts = (
        (f"{millions:.1f} M", "parameters, base tokenizer included"),
        (
            f"{lengths[0]} to {lengths[-1]}",
            f"tokens of {measured.bits[0] / lengths[0]:g} bits an image",
        ),
        (f"{width} x {height}", f"pixels, a grid of {across} x {down} patches"),
        (
            " to ".join(map(str, sorted({min(met), max(met)}))) if met else "none",
            f"tokens met an error of {measured.max_l1:g}",
        ),
    )
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(name),
        count=len(measured.names),
        facts="".join(f"<div><b>{fact}</b><span>{what}</span></div>" for fact, what in facts),
        step=lengths[0],
        verdict=_verdict(measured),
        rows=_rows(measured),
        max_l1=f"{measured.max_l1:g}",
        spread=_spread(measured),
        layers=config.encoder.layers,
        heads=config.encoder.heads,
        grid=f"{across} x {down}",
        about=escape(ABOUT.get(name, UNKNOWN)),
    )


def _rows(measured: Measured) -> str:
    ours, theirs = measured.l1.mean(1).tolist(), measured.thumbnail_l1.mean(1).tolist()
    lines = []
    for length, bits, a, b in zip(measured.lengths, measured.bits, ours, theirs, strict=True):
        mine, other = (' class="better"' if better else "" for better in (a < b, b < a))
        lines.append(f"<tr><td>{length}<td>{bits:.0f}<td{mine}>{a:.3f}<td{other}>{b:.3f}</tr>")
    return "\n".join(lines)


def _verdict(measured: Measured) -> str:
    ours, theirs = measured.l1.mean(1), measured.thumbnail_l1.mean(1)
    wins, count = int((ours < theirs).sum()), len(ours)
    where = f"at {wins} of {count} lengths" if wins < count else f"at all {count} lengths"
    if not wins:
        where = "at none of the lengths"
    ends = zip(measured.lengths[1:], pairwise(ours.tolist()), strict=True)
    worse = [str(length) for length, (before, after) in ends if after > before]
    more = (
        f"More tokens do not lower it at {', '.join(worse)}."
        if worse
        else "Every further iteration lowers it."
    )
    return f"The tokenizer's mean error is below the thumbnail's {where}. {more}"


def _spread(measured: Measured) -> str:
    missed, most = int((~measured.reached).sum()), measured.lengths[-1]
    if not missed:
        return f"All of them get there within {most}."
    return f"{missed} of {len(measured.names)} do not get there with {most} (hatched)."
