"""The pictures of the page. They stand on white, so that they read the same on a light and a dark page."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from ..images import save_image, to_image
from .measure import Measured
from .photographs import FEATURED

OURS, THEIRS, GREY, INK = "#1f6feb", "#d9730d", "#b8bec7", "#24292f"
TILE, GAP, LINE = 176, 4, 22


def pyplot() -> Any:
    """matplotlib.pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG; an old file is replaced only when all is written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    save_image(Image.open(buffer), path)
    pyplot().close(figure)


def reconstructions(measured: Measured, path: Path) -> None:
    """Some photographs, plain to busy, beside every length; below each the thumbnail of as many bits."""
    shown = [b for b, name in enumerate(measured.names) if name in FEATURED]
    columns, high = 1 + len(measured.lengths), 2 * (TILE + LINE) + 3 * GAP
    width, top = columns * (TILE + GAP) + GAP, 2 * LINE + GAP
    sheet = Image.new("RGB", (width, top + len(shown) * high), "white")
    write = _Writer(sheet)
    write(GAP, 2, "original", bold=True)
    for column, (length, bits) in enumerate(zip(measured.lengths, measured.bits, strict=True), 1):
        left = GAP + column * (TILE + GAP)
        write(left, 2, f"{length} tokens", bold=True)
        write(left, 2 + LINE, f"{bits:.0f} bits")
    l1, thumbnail_l1 = measured.l1.tolist(), measured.thumbnail_l1.tolist()
    for line, b in enumerate(shown):
        y = top + line * high
        write.picture(GAP, y, measured.images[b], measured.names[b])
        write(GAP, y + TILE + LINE + GAP, "upper line: tokenizer", OURS)
        write(GAP, y + TILE + 2 * LINE + GAP, "lower line: thumbnail of", THEIRS)
        write(GAP, y + TILE + 3 * LINE + GAP, "as many bits, enlarged", THEIRS)
        for k in range(len(measured.lengths)):
            left = GAP + (k + 1) * (TILE + GAP)
            below = y + TILE + LINE + GAP
            write.picture(left, y, measured.pixels[k, b], f"L1 {l1[k][b]:.3f}", OURS)
            small = f"L1 {thumbnail_l1[k][b]:.3f}"
            write.picture(left, below, measured.thumbnails[k, b], small, THEIRS)
    save_image(sheet, path)


def error(measured: Measured, path: Path) -> None:
    """L1 against tokens: every photograph, their mean, and the thumbnail's mean."""
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    lengths, table = measured.lengths, measured.l1
    for row in table.t().tolist():
        axes.plot(lengths, row, color=GREY, linewidth=1)
    ends = spread(table[-1].tolist(), gap=float(table.max()) / 30)
    for name, height in zip(measured.names, ends, strict=True):
        axes.text(lengths[-1] * 1.015, height, name, fontsize=8, color="#6e7781", va="center")
    for values, style, colour, label in (
        (measured.thumbnail_l1, "s--", THEIRS, "thumbnail of as many bits, mean"),
        (table, "o-", OURS, "tokenizer, mean"),
    ):
        axes.plot(lengths, values.mean(1).tolist(), style, color=colour, linewidth=2.5, label=label)
    axes.plot([], [], color=GREY, label="tokenizer, each photograph")
    axes.set(xlabel="tokens", ylabel="mean absolute pixel error (L1)", xticks=lengths)
    axes.set_ylim(0, 1.25 * float(max(table.max(), measured.thumbnail_l1.mean(1).max())))
    axes.set_xlim(right=lengths[-1] * 1.12)
    axes.grid(axis="y", color="#eaeef2")
    per_token = measured.bits[0] / lengths[0]
    above = axes.secondary_xaxis(
        "top", functions=(lambda x: x * per_token, lambda x: x / per_token)
    )
    above.set_xlabel("bits")
    axes.legend(frameon=False, loc="upper left")
    save(figure, path)


def tokens(measured: Measured, path: Path) -> None:
    """A bar per photograph, from plain to busy: the tokens it takes to meet the fixed error."""
    count = len(measured.names)
    figure, axes = pyplot().subplots(figsize=(8, 0.62 * count + 1.1), layout="constrained")
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    numbers, longest = measured.tokens.tolist(), measured.lengths[-1]
    for place, (number, reached) in enumerate(zip(numbers, measured.reached.tolist(), strict=True)):
        style = {} if reached else {"hatch": "///", "edgecolor": "white", "alpha": 0.45}
        axes.barh(place, number, height=0.7, color=OURS, **style)
        text = str(number) if reached else f"more than {number}"
        axes.text(number + longest * 0.012, place, text, va="center", fontsize=10)
        small = interpolate(measured.images[place][None], size=(96, 96), mode="area")[0]
        picture = OffsetImage(small.permute(1, 2, 0).numpy(), zoom=0.33)
        box = AnnotationBbox(
            picture, (0, place), xybox=(-20, 0), boxcoords="offset points", frameon=False, pad=0
        )
        axes.add_artist(box)
    axes.set_yticks(range(count), measured.names)
    axes.tick_params(axis="y", length=0, pad=42)
    axes.set(xlabel=f"tokens until the error (L1) is below {measured.max_l1:g}")
    axes.set(xticks=measured.lengths, xlim=(0, longest * 1.22), ylim=(count - 0.4, -0.6))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#eaeef2")
    axes.set_axisbelow(True)
    save(figure, path)


def attention(measured: Measured, path: Path) -> None:
    """Two photographs; for each iteration, two latents that it added: where on the photograph they look."""
    from matplotlib import colormaps

    step = measured.lengths[0]
    picked = (0, step // 2)
    shown = [measured.names.index(name) for name in FEATURED[:2]]
    columns = 1 + len(measured.lengths)
    high = len(picked) * (TILE + LINE) + 2 * GAP
    sheet = Image.new(
        "RGB", (columns * (TILE + GAP) + GAP, LINE + GAP + len(shown) * high), "white"
    )
    write = _Writer(sheet)
    for column in range(1, columns):
        write(GAP + column * (TILE + GAP), 2, f"iteration {column}", bold=True)
    for line, b in enumerate(shown):
        y, image = LINE + GAP + line * high, measured.images[b]
        write.picture(GAP, y, image, measured.names[b])
        for column in range(len(measured.lengths)):
            for row, latent in enumerate(picked):
                token = column * step + latent
                seen = _overlay(image, measured.attention[b, token], colormaps["inferno"])
                left, top = GAP + (column + 1) * (TILE + GAP), y + row * (TILE + LINE)
                write.picture(left, top, seen, f"token {token + 1}")
    save_image(sheet, path)


def _overlay(image: Tensor, attention: Tensor, colours: Any) -> Tensor:
    """A map, from its own smallest to its largest value, in colour over the darkened photograph. (3, height, width)"""
    size = (image.shape[1], image.shape[2])
    smooth = interpolate(attention[None, None], size=size, mode="bicubic")[0, 0]
    low, high = attention.aminmax()
    strength = ((smooth - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colour = torch.from_numpy(colours(strength.numpy())[..., :3]).permute(2, 0, 1).float()
    grey = image.mean(0, keepdim=True)
    return 0.4 * grey + 0.75 * colour * strength


def spread(values: list[float], *, gap: float) -> list[float]:
    """The values moved apart to at least ``gap``, in their order, as little as can be (least squares)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks: list[
        list[float]
    ] = []  # runs that touch, their places taken out: the mean of each is where it lies
    for place, index in enumerate(order):
        blocks.append([values[index] - place * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) >= fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [fmean(block) for block in blocks for _ in block]
    placed = list(values)
    for place, index in enumerate(order):
        placed[index] = means[place] + place * gap
    return placed


class _Writer:
    """Text and pictures on a sheet."""

    def __init__(self, sheet: Image.Image) -> None:
        self.sheet, self.draw = sheet, ImageDraw.Draw(sheet)
        self.font = ImageFont.load_default(15)

    def __call__(self, x: int, y: int, text: str, colour: str = INK, *, bold: bool = False) -> None:
        stroke = 0.3 if bold else 0
        self.draw.text((x, y), text, fill=colour, font=self.font, stroke_width=stroke)

    def picture(self, x: int, y: int, pixels: Tensor, caption: str, colour: str = INK) -> None:
        """A tile with a caption below."""
        tile = to_image(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
        self.sheet.paste(tile, (x, y))
        self(x, y + TILE + 1, caption, colour)
