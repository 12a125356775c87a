"""Codec baselines: images as WebP and AVIF files of no more bytes than the tokens take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..images import to_image, to_tensor

#: Formats, and Pillow's options for writing them.
FORMATS = {"webp": {"method": 6}, "avif": {"speed": 6}}


class Shown(NamedTuple):
    """Decoded file: pixels (3, height, width) in [0, 1], of 8 bits; its bytes that count; the longer side it stores."""

    pixels: Tensor
    bytes: int
    side: int


def of_all(images: Tensor, limits: Sequence[int]) -> dict[str, list[list[Shown | None]]]:
    """Files of images (B, 3, height, width) by format, a list from :func:`files` for each image."""
    return {name: [files(x, name, limits) for x in images] for name in FORMATS if has(name)}


def left_out() -> tuple[str, ...]:
    """Formats that this Pillow does not write; a line each."""
    return tuple(f"{name}: this Pillow does not write it" for name in FORMATS if not has(name))


def has(name: str) -> bool:
    """True if this Pillow writes the format."""
    Image.init()
    return name.upper() in Image.SAVE


def files(image: Tensor, name: str, limits: Sequence[int]) -> list[Shown | None]:
    """Best file of at most ``limit`` bytes for each of ``limits``; None where no file is that small.

    The image is halved (bicubic) until the lowest quality fits; then the highest quality that fits is searched, by
    bisection. A halved image is enlarged again (bicubic).

    Args:
        image: (3, height, width) in [0, 1].
        name: "webp", whose whole file counts, or "avif", whose compressed image alone counts, without the container
            around it, which takes about 275 bytes.
    """
    whole = to_image(image)
    sizes = [whole.size]
    while sizes[-1] != (1, 1):
        width, height = sizes[-1]
        sizes.append((max(1, width // 2), max(1, height // 2)))

    @cache
    def written(halvings: int, quality: int) -> bytes:
        file = io.BytesIO()
        small = whole.resize(sizes[halvings], Image.Resampling.BICUBIC)
        small.save(file, format=name, quality=quality, **FORMATS[name])
        return file.getvalue()

    def best(limit: int) -> Shown | None:
        def fits(halvings: int, quality: int) -> bool:
            return _counted(written(halvings, quality), name) <= limit

        halvings = next((x for x in range(len(sizes)) if fits(x, 0)), None)
        if halvings is None:
            return None
        quality, above = 0, 101
        while above - quality > 1:
            middle = (quality + above) // 2
            quality, above = (middle, above) if fits(halvings, middle) else (quality, middle)
        file = written(halvings, quality)
        with Image.open(io.BytesIO(file)) as small:
            enlarged = small.convert("RGB").resize(whole.size, Image.Resampling.BICUBIC)
        return Shown(to_tensor(enlarged), _counted(file, name), max(sizes[halvings]))

    return [best(limit) for limit in limits]


def _counted(file: bytes, name: str) -> int:
    """Number of bytes that count: those in the box ``mdat`` of an AVIF file (ISO/IEC 14496-12), all of other files."""
    if name != "avif":
        return len(file)
    counted = place = 0
    while place < len(file):
        length = int.from_bytes(file[place : place + 4], "big")
        if file[place + 4 : place + 8] == b"mdat":
            counted += length - 8
        place += max(length, 8)
    return counted
