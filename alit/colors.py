"""Conversion of pixels of any mode and color profile to 8-bit sRGB on white."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.ExifTags import Base

#: Exceptions of Pillow and its decoders, beside OSError, for files that are damaged, truncated, or no images.
DAMAGED = (
    *(SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(EOFError, RuntimeError, MemoryError, struct.error),
)
#: Color spaces of ICC profiles, by mode.
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}

Box = tuple[int, int, int, int]


class Scale(NamedTuple):
    """Levels of black and white in a grayscale image of more than 8 bits.

    Attributes:
        black, white: levels; a value outside them counts as the nearer one.
        unsigned: values are unsigned 32-bit integers, which Pillow reads as signed.
    """

    black: float
    white: float
    unsigned: bool = False


def scale(image: Any, boxes: list[Box]) -> Scale:
    """Levels of an image of mode I, I;16 or F: white is 65535, or of floats 1 (255 if a finite value exceeds 2), or the
    largest value of a TIFF of 9 to 15 bits; white and black are swapped if a TIFF says that white is 0.
    """
    tags = getattr(image, "tag_v2", {})
    (bits, *_), (kind, *_) = tags.get(Base.BitsPerSample, (16,)), tags.get(Base.SampleFormat, (1,))
    full = 2**bits - 1 if 8 < bits < 16 else 65535
    if image.mode == "F":
        parts = (np.asarray(image.crop(box)) for box in boxes)
        full = 255 if any(x[np.isfinite(x)].max(initial=0) > 2 for x in parts) else 1
    black, white = (full, 0) if tags.get(Base.PhotometricInterpretation) == 0 else (0, full)
    return Scale(black, white, unsigned=image.mode == "I" and (bits, kind) == (32, 1))


def eight_bits(image: Image.Image, scale: Scale) -> Image.Image:
    """Convert a grayscale image of mode I, I;16 or F to mode L; transparent pixels become white."""
    numbers = np.asarray(image)
    values = (numbers.view(np.uint32) if scale.unsigned else numbers).astype(np.float32)
    shares = (np.nan_to_num(values, nan=scale.black) - scale.black) / (scale.white - scale.black)
    levels = (shares.clip(0, 1) * 255).round().astype(np.uint8)
    if (clear := image.info.get("transparency")) is not None:
        levels[values == clear] = 255
    return Image.fromarray(levels)


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of 8 bits to RGB on white, in sRGB."""
    gray, alpha = image.mode in ("1", "L", "LA"), None
    if image.has_transparency_data:
        image = image.convert("LA" if gray else "RGBA")
        alpha = image.getchannel("A")
    if image.mode not in _SPACES:
        image = image.convert("L" if gray else "RGB")
    transform = to_srgb(profile, image.mode) if profile else None
    rgb = image.convert("RGB") if transform is None else transform(image)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


@lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Function that converts images of a mode to sRGB; None for a profile of other modes, a damaged one, or sRGB's."""
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
