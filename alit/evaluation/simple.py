"""A suite of simple images, drawn by code: what a user would expect to take few tokens.

Eight kinds, four images of each, from a fixed seed. Everything is drawn on a canvas of 1024 pixels and shrunk by
block means, so that lines are smooth and an image is the same at every size. Nothing lies on a grid of blocks, which
would favor block codecs. Text needs a Pillow with FreeType, whose versions may differ in the edges of letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from ..images import to_tensor

#: Side of the canvas, and images of a kind.
CANVAS, EACH = 1024, 4
WHITE, INK = (255, 255, 255), (28, 30, 36)
WORDS = (
    "an image takes as many tokens as it needs river stone garden window seven paper light north the of morning "
    "market train and letter harbor quiet for number field with open glass under winter road"
)

Color = tuple[int, int, int]
Point = tuple[float, float]


class Drawing(NamedTuple):
    """Drawn image: its kind, and pixels (3, side, side) float32 in [0, 1]."""

    kind: str
    pixels: Tensor


def drawings(side: int) -> list[Drawing]:
    """Drawings of the suite, kind by kind, ``side`` pixels squared; the same in every call.

    Raises:
        ValueError: this Pillow has no FreeType.
    """
    if not features.check("freetype2"):
        raise ValueError(
            "suite: expected a Pillow with FreeType, which writes text, got one without"
        )
    drawn = []
    for kind, draw in KINDS.items():
        for number in range(EACH):
            random = Random(f"{kind} {number}")
            canvas = draw(random)
            small = canvas.resize((side, side), Image.Resampling.BOX)
            drawn.append(Drawing(kind, to_tensor(small)))
    return drawn


def _color(random: Random, low: int = 30, high: int = 225) -> Color:
    red, green, blue = (int(random.uniform(low, high)) for _ in range(3))
    return red, green, blue


def _canvas(background: Color) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (CANVAS, CANVAS), background)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _phrase(random: Random, words: int) -> str:
    return " ".join(random.choice(WORDS.split()) for _ in range(words))


def _flat(random: Random) -> Image.Image:
    return _canvas(_color(random, 0, 255))[0]


def _gradient(random: Random) -> Image.Image:
    """Gradient from one color to another, along a line or from a point."""
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    if random.random() < 0.5:
        angle = random.uniform(0, 2 * math.pi)
        place = x * math.cos(angle) + y * math.sin(angle)
    else:
        place = np.hypot(x - random.uniform(0.2, 0.8), y - random.uniform(0.2, 0.8))
    share = ((place - place.min()) / np.ptp(place))[..., None]
    first, last = np.array(_color(random, 0, 255)), np.array(_color(random, 0, 255))
    return Image.fromarray((first + (last - first) * share).round().astype(np.uint8))


def _line_drawing(random: Random) -> Image.Image:
    """Curves and outlines in ink."""
    image, draw = _canvas(WHITE)
    width = int(random.uniform(6, 12))
    for _ in range(4):
        ends = np.array([[random.uniform(80, 944) for _ in range(2)] for _ in range(4)])
        t = np.linspace(0, 1, 200)[:, None]
        weights = np.concatenate(
            [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3], axis=1
        )
        draw.line([(x, y) for x, y in weights @ ends], fill=INK, width=width, joint="curve")
    for _ in range(3):
        x, y, radius = (random.uniform(*span) for span in ((200, 824), (200, 824), (60, 180)))
        corners = int(random.uniform(3, 7))
        turn = random.uniform(0, 360)
        points = _polygon((x, y), radius, corners, turn)
        draw.line([*points, points[0], points[1]], fill=INK, width=width, joint="curve")
    x, y, radius = (random.uniform(*span) for span in ((250, 774), (250, 774), (80, 200)))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=INK, width=width)
    return image


def _polygon(center: Point, radius: float, corners: int, turn: float) -> list[Point]:
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    return [(center[0] + radius * math.cos(a), center[1] + radius * math.sin(a)) for a in angles]


def _star(center: Point, radius: float) -> list[Point]:
    outer, inner = _polygon(center, radius, 5, -90), _polygon(center, 0.45 * radius, 5, -54)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _text(random: Random) -> Image.Image:
    """Lines of text, dark on light or light on dark."""
    dark = random.random() < 0.3
    image, draw = _canvas(INK if dark else WHITE)
    size = int(random.uniform(56, 112))
    for top in range(64, 1024 - 64 - size, int(1.5 * size)):
        line = _phrase(random, 1)
        while draw.textlength(line, font=_font(size)) < 560:
            line += " " + _phrase(random, 1)
        draw.text((68, top), line, font=_font(size), fill=WHITE if dark else INK)
    return image


def _shape(draw: ImageDraw.ImageDraw, random: Random, center: Point, radius: float) -> None:
    """Draw a disk, a ring, a polygon or a star."""
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    fill, kind = _color(random), int(random.uniform(0, 4))
    if kind == 0:
        draw.ellipse(box, fill=fill)
    elif kind == 1:
        draw.ellipse(box, outline=fill, width=int(radius / 3))
    elif kind == 2:
        draw.polygon(_polygon(center, radius, int(random.uniform(3, 7)), -90), fill=fill)
    else:
        draw.polygon(_star(center, radius), fill=fill)


def _icon(random: Random) -> Image.Image:
    """A rounded square with a shape in it."""
    image, draw = _canvas(WHITE)
    draw.rounded_rectangle((148, 148, 876, 876), radius=160, fill=_color(random))
    _shape(draw, random, (512, 512), random.uniform(220, 300))
    _shape(draw, random, (512, 512), random.uniform(70, 110))
    return image


def _chart(random: Random) -> Image.Image:
    """Bars, lines or a pie, with axes and a heading."""
    image, draw = _canvas(WHITE)
    draw.text((140, 48), _phrase(random, 2), font=_font(64), fill=INK)
    if random.random() < 0.3:
        start = 0.0
        while start < 360:
            end = min(360, start + random.uniform(40, 110))
            draw.pieslice((228, 236, 860, 868), start, end, fill=_color(random))
            start = end
        return image
    for y in range(236, 884, 148):
        draw.line((140, y, 948, y), fill=(215, 215, 215), width=4)
    if random.random() < 0.5:
        color = _color(random)
        for x in range(180, 900, 124):
            draw.rectangle((x, random.uniform(220, 780), x + 76, 884), fill=color)
    else:
        for _ in range(2):
            points = [(x, random.uniform(240, 860)) for x in range(148, 948, 102)]
            draw.line(points, fill=_color(random), width=12, joint="curve")
    draw.line((140, 172, 140, 884, 948, 884), fill=INK, width=8)
    return image


def _screenshot(random: Random) -> Image.Image:
    """A window: title, a list at the left, paragraphs and buttons."""
    image, draw = _canvas((244, 245, 247))
    accent = _color(random)
    draw.rectangle((0, 0, 1024, 100), fill=accent)
    draw.text((32, 20), _phrase(random, 2), font=_font(48), fill=WHITE)
    draw.rectangle((0, 100, 300, 1024), fill=(226, 229, 234))
    chosen = int(random.uniform(0, 6))
    for row in range(6):
        top = 128 + 96 * row
        if row == chosen:
            draw.rectangle((0, top - 20, 300, top + 60), fill=WHITE)
        draw.text((32, top), _phrase(random, 1), font=_font(40), fill=INK)
    draw.rounded_rectangle((348, 148, 972, 780), radius=16, fill=WHITE, outline=(200, 204, 210))
    for row in range(int(random.uniform(5, 9))):
        draw.text((380, 172 + 64 * row), _phrase(random, 3), font=_font(36), fill=INK)
    for left, fill in ((348, accent), (676, (190, 195, 203))):
        draw.rounded_rectangle((left, 852, left + 252, 940), radius=24, fill=fill)
        draw.text((left + 48, 868), _phrase(random, 1), font=_font(44), fill=WHITE)
    return image


def _logo(random: Random) -> Image.Image:
    """Two shapes one over the other, and a name below."""
    image, draw = _canvas(WHITE if random.random() < 0.5 else _color(random, 200, 255))
    for left in (420, 604):
        _shape(draw, random, (left, 400), random.uniform(170, 230))
    name, size = _phrase(random, 1).capitalize(), 150
    width = draw.textlength(name, font=_font(size))
    draw.text((512 - width / 2, 700), name, font=_font(size), fill=_color(random, 10, 120))
    return image


#: Kinds, in the order of the suite.
KINDS: dict[str, Callable[[Random], Image.Image]] = {
    "flat": _flat,
    "gradient": _gradient,
    "line drawing": _line_drawing,
    "text": _text,
    "icon": _icon,
    "chart": _chart,
    "screenshot": _screenshot,
    "logo": _logo,
}
