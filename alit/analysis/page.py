"""``index.html``: one file with all charts and images in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from ..demo.sheet import Tile
from ..images import to_image
from ..plots import BLUE, ORANGE
from . import charts
from .analyze import Analysis
from .complexity import Complexity
from .familiarity import AS_THEY_ARE, Familiarity
from .gallery import Gallery
from .specialization import Specialization
from .statistics import Interval
from .task import Length

#: Colors of kinds of images, in order.
COLORS = ["--blue", "--green", "--purple", "--orange", "--pink", "--teal", "--brown", "--soft"]
TILE_COLORS = {BLUE: " blue", ORANGE: " orange"}
#: Longest side of a tile, in pixels.
SIDE = 192


def page(name: str, result: Analysis) -> str:
    """HTML page of an analysis of the model ``name``; nothing is loaded from elsewhere."""
    facts = [
        (str(result.images), "images"),
        (f"{result.lengths[0]} to {result.lengths[-1]}", "tokens"),
        (f"{result.l1[0]:.3f} to {result.l1[-1]:.3f}", "mean L1 at these lengths"),
    ]
    if result.second is not None:
        facts.append((str(result.second), "images of the second folder"))
    bodies = {
        "complexity": _complexity(result.complexity, result.max_l1),
        "familiarity": _familiarity(result.familiarity),
    }
    if result.task:
        bodies["task"] = _task(result.task, result.classifier)
    if result.specialization is not None:
        bodies["specialization"] = _specialization(result.specialization)
    said = verdicts(result)
    sections = (
        f'<section><h2>{name.capitalize()}</h2><p class="verdict">{escape(said[name])}</p>'
        f"{body}{gallery(result.galleries[name])}</section>"
        for name, body in bodies.items()
    )
    missing = "; ".join(map(escape, result.left_out))
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(name),
        facts="".join(f"<div><b>{fact}</b><span>{what}</span></div>" for fact, what in facts),
        seed=result.seed,
        sections="\n".join(sections),
        left_out=f"<p>Left out: {missing}.</p>" if missing else "",
    )


def verdicts(result: Analysis) -> dict[str, str]:
    """Findings by section, a sentence or two for each section that was measured."""
    at = next(x for x in result.complexity.thresholds if x.max_l1 == result.max_l1)
    found = {
        "complexity": f"At L1 below {at.max_l1:g}, tokens rise with the size of a JPEG file at a rank correlation of "
        f"{_number(at.jpeg)}, and with the entropy of gray levels at {_number(at.entropy)}."
    }
    if at.scores is not None and at.scores_given_first is not None:
        found["complexity"] += (
            f" With people's scores: {_number(at.scores)}; JPEG size alone has {_number(result.complexity.jpeg)}."
            f" Given the error after the first iteration, {_number(at.scores_given_first)} is left."
        )
    last = {kind.name: kind.l1[-1] for kind in result.familiarity.kinds[1:]}
    worst = max(last, key=lambda name: last[name].matched.value or 0.0)
    least = min(last, key=lambda name: last[name].matched.value or 0.0)
    found["familiarity"] = (
        f"With all tokens, and matched for JPEG size, the error rises most for \u201c{worst}\u201d, "
        f"by {_number(last[worst].matched, '+.4f')}, and least for \u201c{least}\u201d, "
        f"by {_number(last[least].matched, '+.4f')}."
    )
    if result.task:
        best = max(result.task, key=lambda x: x.model.top1.value or 0.0)
        thumb = max(result.task, key=lambda x: x.thumbnail.top1.value or 0.0)
        found["task"] = (
            f"At best, with {best.tokens} tokens, the classifier sees in {_number(best.model.top1, '.0%')} of the "
            f"reconstructions what it sees in the image; in thumbnails of as many bits, at best, in "
            f"{_number(thumb.thumbnail.top1, '.0%')} ({thumb.tokens} tokens)."
        )
    if (its := result.specialization) is not None:
        better = [
            x.maps
            for x in its.controls[:-1]
            if (x.oracle.value or 0) >= (its.tokens.oracle.value or 0)
        ]
        rest = f"Better or as good: {', '.join(better)}." if better else "No control is as good."
        found["specialization"] = (
            f"The best token of each segment overlaps it by {_number(its.tokens.oracle)} (intersection over union, "
            f"best threshold). {rest}"
        )
    return found


def _number(x: Interval | None, form: str = ".2f") -> str:
    """Text of an estimate with its interval, or "undefined"."""
    if x is None or x.value is None or x.low is None or x.high is None:
        return "undefined"
    value, low, high = (f"{v:{form}}".replace("-", "\u2212") for v in (x.value, x.low, x.high))
    return f"{value} ({low} to {high})"


def _cell(x: Interval | None, form: str = ".2f") -> str:
    value, _, rest = _number(x, form).partition(" ")
    return f"<td>{value} <small>{rest}</small>"


def _card(*content: str) -> str:
    return "".join(f'<div class="card">{x}</div>' for x in content)


def _table(headings: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(x)}" for x in headings)
    return _card(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _complexity(found: Complexity, max_l1: float) -> str:
    scored = found.jpeg is not None
    at = next(x for x in found.thresholds if x.max_l1 == max_l1)
    limit = f"{at.max_l1:g}"
    rows: list[tuple[str, Interval, str]] = []
    if at.scores is not None and at.scores_given_first is not None:
        rows += [
            ("tokens and scores", at.scores, "--blue"),
            ("the same, given first L1", at.scores_given_first, "--blue"),
        ]
    yardsticks = (("JPEG size", found.jpeg), ("entropy", found.entropy), ("first L1", found.first))
    rows += [(f"{name} and scores", x, "--orange") for name, x in yardsticks if x is not None]
    rows += [
        ("tokens and JPEG size", at.jpeg, "--green"),
        ("tokens and entropy", at.entropy, "--green"),
    ]
    chart = charts.forest(rows, x=f"Spearman's rank correlation, tokens at L1 below {limit}")
    xs = [x.max_l1 for x in found.thresholds]
    tokens = charts.Series("mean tokens", [x.tokens for x in found.thresholds], "--blue")
    needed = charts.lines(xs, [tokens], x="L1 that is asked for", y="tokens")
    text = (
        "<p>Tokens are those of the first iteration whose error is below the limit, all where none is. The yardstick "
        "is a JPEG file of quality 90. First L1 is the error after the first iteration: a correlation that is left "
        "when it is given is what further iterations know.</p>"
    )
    headings = ["L1 below", "met", "tokens", "JPEG size", "entropy"]
    headings += ["scores", "scores given first L1"] if scored else []
    table = _table(
        headings,
        (
            f"<tr><td>{x.max_l1:g}<td>{x.met:.0%}<td>{x.tokens:.1f}{_cell(x.jpeg)}{_cell(x.entropy)}"
            + (f"{_cell(x.scores)}{_cell(x.scores_given_first)}" if scored else "")
            + "</tr>"
            for x in found.thresholds
        ),
    )
    return f'{text}<div class="pair">{_card(chart, needed)}</div>{table}'


def _familiarity(found: Familiarity) -> str:
    middle = len(found.thresholds) // 2
    colors = dict(zip([x.name for x in found.kinds], COLORS, strict=False))
    series = [
        charts.Series(x.name, [y.mean for y in x.l1], colors[x.name], dashed=x.name != AS_THEY_ARE)
        for x in found.kinds
    ]
    curves = charts.lines(found.lengths, series, x="tokens", y="L1")
    rows = [(x.name, x.l1[-1].matched, colors[x.name]) for x in found.kinds[1:]]
    matched = charts.forest(rows, x="L1 with all tokens, beyond what JPEG size explains")
    text = (
        "<p>The same images are changed, and encoded again. Changed images may be harder for everybody, so each "
        "difference is also matched: it is taken over the least squares line of L1, or of tokens, on the logarithm of "
        "JPEG size, fitted to the images as they are. Where JPEG sizes lie beyond those of the images as they are, "
        "the line is prolonged, and a matched difference says less.</p>"
    )
    first, last = found.lengths[0], found.lengths[-1]
    limit = f"{found.thresholds[middle]:g}"
    headings = ["images", "JPEG bytes", "beyond"]
    for what in (f"L1, {first} tokens", f"L1, {last} tokens", f"tokens at {limit}"):
        headings += [what, "more, matched"]
    table = _table(
        headings,
        (
            f"<tr><td>{x.name}<td>{x.jpeg:.0f}<td>{x.beyond:.0%}"
            + "".join(
                f"<td>{y.mean:{form}}{_cell(y.matched, '+' + form) if x.name != AS_THEY_ARE else '<td>'}"
                for y, form in ((x.l1[0], ".4f"), (x.l1[-1], ".4f"), (x.tokens[middle], ".1f"))
            )
            + "</tr>"
            for x in found.kinds
        ),
    )
    return f'{text}<div class="pair">{_card(curves, matched)}</div>{table}'


def _task(found: Sequence[Length], classifier: str | None) -> str:
    xs = [x.tokens for x in found]
    series = [
        charts.Series(
            f"{who}, top-{k}",
            [getattr(getattr(x, who), f"top{k}").value for x in found],
            color,
            k == 5,
        )
        for who, color in (("model", "--blue"), ("thumbnail", "--orange"))
        for k in (1, 5)
    ]
    chart = charts.lines(xs, series, x="tokens", y="share of images")
    text = (
        f"<p>A classifier, {escape(classifier or '')}, looks at each image and at its reconstruction. Top-1: its "
        "likeliest class is the same; top-5: that of the image is among the first five of the reconstruction. Beside "
        "it a thumbnail of as many bits, enlarged.</p>"
    )
    table = _table(
        ["tokens", "bits", "model, top-1", "top-5", "thumbnail, top-1", "top-5"],
        (
            f"<tr><td>{x.tokens}<td>{x.bits:.0f}"
            + "".join(_cell(y, ".0%") for a in (x.model, x.thumbnail) for y in (a.top1, a.top5))
            + "</tr>"
            for x in found
        ),
    )
    return text + _card(chart) + table


def _specialization(found: Specialization) -> str:
    every = [found.tokens, *found.controls]
    rows = [(x.maps, x.oracle, "--blue" if x is found.tokens else "--orange") for x in every]
    chart = charts.forest(rows, x="intersection over union, best map at its best threshold")
    numbers = range(1, len(found.iterations) + 1)
    series = [charts.Series("tokens it added", found.iterations, "--blue")]
    each = charts.lines(numbers, series, x="iteration", y="intersection over union")
    down, across = found.grid
    text = (
        f"<p>People drew {found.segments} segments that count in {found.images} images. An attention map has "
        f"{across} x {down} places; above a threshold it is a mask, held against the segment in pixels. Maps are those "
        f"of encoder layer {found.layer}, the best of {len(found.layers)} on these segments. The best of many maps is "
        "good whatever the maps are: only what lies above the controls says that a token looks at things.</p>"
    )
    table = _table(
        ["maps", "best threshold", "mean + std"],
        (f"<tr><td>{x.maps}{_cell(x.oracle)}{_cell(x.mean_std)}</tr>" for x in every),
    )
    return f'{text}<div class="pair">{_card(chart, each)}</div>{table}'


def gallery(found: Gallery) -> str:
    """HTML of a gallery, with its images embedded."""
    rows = []
    for number, row in enumerate(found.rows):
        apart = " apart" if number and number % found.together == 0 else ""
        rows.append(f'<div class="row{apart}">{"".join(map(_tile, row))}</div>')
    tiles = f'<div class="tiles">{"".join(rows)}</div>'
    return f"<h3>{escape(found.title)}</h3>{_card(tiles)}"


def _tile(tile: Tile) -> str:
    tag = ""
    if tile.pixels is not None:
        image, file = to_image(tile.pixels), io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.save(file, "PNG" if max(image.size) < 64 else "JPEG", quality=88)
        kind = "png" if max(image.size) < 64 else "jpeg"
        data = base64.b64encode(file.getvalue()).decode()
        tag = (
            f'<img alt="{escape(tile.caption, quote=True)}" src="data:image/{kind};base64,{data}">'
        )
    color = TILE_COLORS.get(tile.color, "")
    return f'<figure class="tile{color}">{tag}{escape(tile.caption)}</figure>'
