"""Tables and plots of an evaluation and of a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..console import counted
from ..plots import BLUE, GRAY, INK, ORANGE, pyplot, save
from .calibration import Calibration
from .logistic import Accuracy
from .probe import Described, Probe
from .results import Blockiness, Evaluation, FileQuality

#: Heading and format of each field of :class:`alit.evaluation.Quality`.
COLUMNS = {
    "l1": ("L1", ".4f"),
    "psnr": ("PSNR", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".3f"),
    "top1": ("top-1", ".0%"),
    "top5": ("top-5", ".0%"),
    "rfid": ("rFID", ".1f"),
}


def tables(result: Evaluation) -> list[Table]:
    """Tables of quality, files of as many bytes, iterations and kinds of drawn images, as far as they were measured."""
    found = [_quality(result)]
    found += [_files(result)] if any(x.webp or x.avif for x in result.lengths) else []
    found += [_iterations(result)] if result.iterations else []
    return found + ([_kinds(result)] if result.kinds else [])


def _quality(result: Evaluation) -> Table:
    title = (
        f"{counted(result.images, 'image')}, {result.protocol} protocol; thumbnail in brackets; "
        f"blocks of the originals: {_blocks(result.blockiness)}"
    )
    has = [x for x in COLUMNS if getattr(result.lengths[0].model, x) is not None]
    names = [COLUMNS[x][0] for x in has]
    table = Table("tokens", "bits", *names, "loses", "blocks", title=title)
    for row in result.lengths:
        values = (
            f"{getattr(row.model, x):{COLUMNS[x][1]}} ({getattr(row.thumbnail, x):{COLUMNS[x][1]}})"
            for x in has
        )
        first = str(row.tokens), f"{row.bits:.0f}"
        table.add_row(*first, *values, str(row.loses), _blocks(row.blockiness))
    return table


def _blocks(x: Blockiness) -> str:
    return ", ".join("-" if step is None else f"{step:.2f}" for step in (x.step_32, x.step_8))


def _files(result: Evaluation) -> Table:
    title = "files of at most as many bytes (AVIF without container): L1, PSNR, SSIM"
    formats = [x for x in ("webp", "avif") if any(getattr(row, x) for row in result.lengths)]
    headings = (heading for x in formats for heading in (f"{x}, bytes", "side", "quality", "wins"))
    table = Table("tokens", *headings, title=title)
    for row in result.lengths:
        cells = [str(row.tokens)]
        for file in (getattr(row, x) for x in formats):
            if file is None:
                cells += ["-"] * 4
                continue
            its = file.quality
            quality = f"{its.l1:.4f}, {its.psnr:.2f}, {its.ssim:.3f}"
            cells += [f"{file.bytes:.0f}", f"{file.side:.0f}", quality, str(file.wins)]
        table.add_row(*cells)
    return table


def _iterations(result: Evaluation) -> Table:
    longest = result.lengths[-1].model.l1
    title = (
        "codes so far, and in brackets of the iteration's own tokens; "
        f"L1 {longest:.4f} with random ones in their place"
    )
    table = Table("tokens", "codes used", "perplexity", "L1 replaced", title=title)
    for row, part in zip(result.lengths, result.iterations, strict=True):
        assert row.codes_used is not None and row.perplexity is not None
        table.add_row(
            f"{row.tokens} ({part.first}-{part.last})",
            f"{row.codes_used:.1%} ({part.codes_used:.1%})",
            f"{row.perplexity:.0f} ({part.perplexity:.0f})",
            f"{part.replaced:.4f}" + (f" ({part.replaced / longest - 1:+.1%})" if longest else ""),
        )
    return table


def _kinds(result: Evaluation) -> Table:
    won = sum(kind.beats_thumbnail for kind in result.kinds)
    title = f"L1 by tokens, thumbnail in brackets; {won} of {len(result.kinds)} kinds beat it at every length"
    lengths = (str(row.tokens) for row in result.lengths)
    table = Table("kind", *lengths, "beats the thumbnail", title=title)
    for kind in result.kinds:
        cells = (f"{row.model:.3f} ({row.thumbnail:.3f})" for row in kind.lengths)
        table.add_row(kind.kind, *cells, "yes" if kind.beats_thumbnail else "no")
    return table


def calibration_table(rows: Sequence[Calibration]) -> Table:
    title = "asked against got"
    table = Table("criterion", "limit", "met", "tokens", "error got", "within", title=title)
    for x in rows:
        shares = f"{x.met:.0%}", f"{x.tokens:.1f}", f"{x.error:.4g}", f"{x.within:.0%}"
        table.add_row(x.criterion, f"{x.limit:.4g}", *shares)
    return table


def probe_table(result: Probe) -> Table:
    title = (
        f"top-1 and its 95 % interval: {counted(result.test, 'test image')} of {len(result.classes)} classes, "
        f"{result.training} to learn from; the most frequent class: {result.chance:.0%}"
    )
    names = (x.replace("_", "\n") for x in Described._fields)
    table = Table("tokens", *names, title=title, show_lines=True)
    for row in result.lengths:
        cells = (_accuracy(getattr(row, name)) for name in Described._fields)
        table.add_row(str(row.tokens), *cells)
    return table


def _accuracy(x: Accuracy) -> str:
    low, high = f"{100 * x.low:.0f}", f"{100 * x.high:.0f}"
    return f"{x.top1:.0%}\n{low if low == high else f'{low}-{high}'}"


def plot_probe(result: Probe, path: Path) -> None:
    """Plot accuracy by tokens, with its interval, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, panels = pyplot().subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    tokens = [row.tokens for row in result.lengths]
    for axes, name in zip(panels, ("latents", "codes", "all_codes"), strict=True):
        for kind, label, style, color in (
            (name, "model", "o-", BLUE),
            (f"random_{name}", "random weights", "^:", GRAY),
            ("thumbnail", "thumbnail", "s--", ORANGE),
        ):
            found = [getattr(row, kind) for row in result.lengths]
            axes.plot(tokens, [x.top1 for x in found], style, color=color, label=label)
            low, high = [x.low for x in found], [x.high for x in found]
            axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(result.chance, color=INK, linestyle=":", label="most frequent class")
        axes.set(title=name.replace("_", " "), xlabel="tokens", ylabel="top-1", ylim=(0, 1))
    panels[0].legend(frameon=False)
    save(figure, path)


def plot(result: Evaluation, path: Path) -> None:
    """Plot quality of model, thumbnails and files by bits, steps at block borders, and codes by iteration, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, rows = pyplot().subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axes, name in zip(rows[0], ("l1", "psnr", "ssim"), strict=True):
        _plot_quality(axes, result, name)
    rows[0][0].legend(frameon=False)
    _plot_blocks(rows[1][0], result)
    if result.iterations:
        _plot_iterations(rows[1][1], rows[1][2], result)
    else:
        rows[1][1].set_axis_off()
        rows[1][2].set_axis_off()
    save(figure, path)


def _plot_quality(axes: Any, result: Evaluation, name: str) -> None:
    for kind, label, style, color in (
        ("model", "model", "o-", BLUE),
        ("thumbnail", "thumbnail", "s--", ORANGE),
        ("webp", "WebP file", "^:", INK),
        ("avif", "AVIF without container", "v:", GRAY),
    ):
        found = [(row.bits, x) for row in result.lengths if (x := getattr(row, kind)) is not None]
        shown = [x.quality if isinstance(x, FileQuality) else x for _, x in found]
        values = [getattr(quality, name) for quality in shown]
        axes.plot([bits for bits, _ in found], values, style, color=color, label=label)
    axes.set(xlabel="bits per image", ylabel=COLUMNS[name][0])


def _plot_blocks(axes: Any, result: Evaluation) -> None:
    for name, color in (("step_32", BLUE), ("step_8", ORANGE)):
        there = [x for x in result.lengths if getattr(x.blockiness, name) is not None]
        bits, steps = [x.bits for x in there], [getattr(x.blockiness, name) for x in there]
        label = f"borders of {name.removeprefix('step_')} pixels"
        axes.plot(bits, steps, "o-", color=color, label=label)
        if (own := getattr(result.blockiness, name)) is not None:
            axes.axhline(own, color=color, linestyle=":")
    axes.set(xlabel="bits per image", ylabel="step over that elsewhere", ylim=(0, None))
    axes.legend(frameon=False, title="dotted: the originals")


def _plot_iterations(codes: Any, replaced: Any, result: Evaluation) -> None:
    numbers = range(1, len(result.iterations) + 1)
    so_far, alone = ([x.perplexity for x in rows] for rows in (result.lengths, result.iterations))
    codes.plot(numbers, so_far, "s--", color=GRAY, label="all tokens so far")
    codes.plot(numbers, alone, "o-", color=BLUE, label="tokens of the iteration")
    codes.set(xlabel="iteration", ylabel="perplexity", ylim=(0, None))
    codes.legend(frameon=False)
    replaced.bar(numbers, [x.replaced for x in result.iterations], color=GRAY)
    replaced.axhline(result.lengths[-1].model.l1, color=BLUE)
    replaced.set(xlabel="iteration with random codes", ylabel="L1 at the longest length")
