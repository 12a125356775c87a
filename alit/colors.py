"""Pixels of any mode and color profile as RGB of 8 bits, in sRGB, on white."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

#: What Pillow and its decoders raise, beside OSError, on files that are damaged, truncated, or no pictures.
DAMAGED = (
    *(SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(EOFError, RuntimeError, MemoryError, struct.error),
)
#: Color spaces of ICC profiles, by mode.
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}

Box = tuple[int, int, int, int]


def full_scale(image: Image.Image, boxes: list[Box]) -> float:
    """The number that is white."""
    if image.mode != "F":
        return 65535
    for box in boxes:
        values = np.asarray(image.crop(box))
        if values[np.isfinite(values)].max(initial=0) > 2:
            return 255
    return 1


def eight_bits(image: Image.Image, full: float) -> Image.Image:
    """Greyscale of mode I, I;16 or F as L; what is transparent is white."""
    values = np.asarray(image, dtype=np.float32)
    levels = ((np.nan_to_num(values) / full).clip(0, 1) * 255).round().astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        levels[values == clear] = 255
    return Image.fromarray(levels)


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of 8 bits, on white, in sRGB."""
    grey, alpha = image.mode in ("1", "L", "LA"), None
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
    if image.mode not in _SPACES:
        image = image.convert("L" if grey else "RGB")
    transform = to_srgb(profile, image.mode) if profile else None
    rgb = image.convert("RGB") if transform is None else transform(image)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


@lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Conversion of pictures of a mode; None for a profile of others, a damaged one, and one that is sRGB's."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if own.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError, *DAMAGED):
        return None
    if mode in ("L", "RGB"):
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        levels = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
        probe = Image.fromarray(levels).convert(mode)
        before, after = (np.asarray(x, int) for x in (probe.convert("RGB"), transform.apply(probe)))
        if abs(before - after).max() <= 1:
            return None
    return transform.apply
