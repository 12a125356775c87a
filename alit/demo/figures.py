"""Figures of the page, on white, so that they read the same on a light and a dark page."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..images import save_image
from ..plots import BLUE, GRAY, ORANGE, pyplot, save
from . import FEATURED
from .measure import Measured
from .sheet import Tile, sheet


def reconstructions(measured: Measured, path: Path, names: Collection[str] = FEATURED) -> None:
    """Write a sheet of photographs, plain to busy, at every length; below each the thumbnail of as many bits."""
    bits = zip(measured.lengths, measured.bits, strict=True)
    titles = ["original", *(f"{length} tokens\n{count:.0f} bits" for length, count in bits)]
    legend = Tile("blue: tokenizer\norange: thumbnail of\nas many bits, enlarged")
    rows = []
    for b, name in enumerate(measured.names):
        if name in names:
            for first, pixels, l1, color in (
                (Tile(name, measured.images[b]), measured.pixels, measured.l1, BLUE),
                (legend, measured.thumbnails, measured.thumbnail_l1, ORANGE),
            ):
                shown = zip(pixels[:, b], l1[:, b].tolist(), strict=True)
                rows.append([first, *(Tile(f"L1 {error:.3f}", x, color) for x, error in shown)])
    save_image(sheet(titles, rows, together=2), path)


def error(measured: Measured, path: Path) -> None:
    """Plot L1 against tokens: every photograph, their mean, and the thumbnail's mean."""
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    lengths, table = measured.lengths, measured.l1
    axes.plot(lengths, table.numpy(), color=GRAY, linewidth=1)
    ends = spread(table[-1].tolist(), gap=float(table.max()) / 30)
    for name, height in zip(measured.names, ends, strict=True):
        axes.text(lengths[-1] * 1.015, height, name, fontsize=8, color="#6e7781", va="center")
    for values, style, color, label in (
        (measured.thumbnail_l1, "s--", ORANGE, "thumbnail of as many bits, mean"),
        (table, "o-", BLUE, "tokenizer, mean"),
    ):
        axes.plot(lengths, values.mean(1).tolist(), style, color=color, linewidth=2.5, label=label)
    axes.plot([], [], color=GRAY, label="tokenizer, each photograph")
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
    """Plot a bar per photograph, from plain to busy: the tokens it takes to meet the fixed error."""
    count = len(measured.names)
    figure, axes = pyplot().subplots(figsize=(8, 0.62 * count + 1.1), layout="constrained")
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    numbers, longest = measured.tokens.tolist(), measured.lengths[-1]
    for place, (number, reached) in enumerate(zip(numbers, measured.reached.tolist(), strict=True)):
        style = {} if reached else {"hatch": "///", "edgecolor": "white", "alpha": 0.45}
        axes.barh(place, number, height=0.7, color=BLUE, **style)
        text = str(number) if reached else f"more than {number}"
        axes.text(number + longest * 0.012, place, text, va="center", fontsize=10)
        small = interpolate(measured.images[place][None], size=(96, 96), mode="area")[0]
        image = OffsetImage(small.permute(1, 2, 0).numpy(), zoom=0.33)
        box = AnnotationBbox(
            image, (0, place), xybox=(-20, 0), boxcoords="offset points", frameon=False, pad=0
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
    """Write a sheet of attention maps on two photographs, of two latents that each iteration added."""
    from matplotlib import colormaps

    step, columns = measured.lengths[0], range(len(measured.lengths))
    rows = []
    for b in map(measured.names.index, FEATURED[:2]):
        image = measured.images[b]
        for first, latent in ((Tile(measured.names[b], image), 0), (Tile(""), step // 2)):
            looked = [column * step + latent for column in columns]
            maps = (_overlay(image, measured.attention[b, x], colormaps["inferno"]) for x in looked)
            named = zip(looked, maps, strict=True)
            rows.append([first, *(Tile(f"token {x + 1}", pixels) for x, pixels in named)])
    titles = ["", *(f"iteration {column + 1}" for column in columns)]
    save_image(sheet(titles, rows, together=2), path)


def loss(errors: list[float], path: Path) -> None:
    """Plot the code error of every training step."""
    figure, axes = pyplot().subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(range(1, len(errors) + 1), errors, linewidth=1, color=BLUE)
    axes.set(xlabel="step", ylabel="code error (mse)", yscale="log", title="Training")
    save(figure, path)


def _overlay(image: Tensor, attention: Tensor, colors: Any) -> Tensor:
    """Attention map, scaled to its own range, in color over the darkened photograph: (3, height, width)."""
    size = (image.shape[1], image.shape[2])
    smooth = interpolate(attention[None, None], size=size, mode="bicubic")[0, 0]
    low, high = attention.aminmax()
    strength = ((smooth - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    color = torch.from_numpy(colors(strength.numpy())[..., :3]).permute(2, 0, 1).float()
    gray = image.mean(0, keepdim=True)
    return 0.4 * gray + 0.75 * color * strength


def spread(values: list[float], *, gap: float) -> list[float]:
    """Values moved apart to at least ``gap``, in their order, by as little as possible (least squares)."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(values, kind="stable")
    steps, placed = gap * np.arange(len(values)), np.empty(len(values))
    placed[order] = isotonic_regression(np.asarray(values)[order] - steps).x + steps
    return placed.tolist()
