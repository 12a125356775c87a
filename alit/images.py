"""Reading and writing pictures: any mode and orientation in, float tensors in [0, 1] out."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .files import replacing

#: What Pillow and its decoders raise, beside OSError, on files that are damaged, truncated, or no pictures.
_DAMAGED = (
    *(SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(EOFError, RuntimeError, struct.error, Image.DecompressionBombError),
)


def list_images(folder: str | Path) -> list[Path]:
    """Files with the suffix of a picture in a folder and the folders in it, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder}: not a folder")
    next(folder.iterdir(), None)  # rglob passes over a folder that cannot be read; this raises
    files = sorted(filter(_is_picture, folder.rglob("*")))
    if not files:
        raise ValueError(f"{folder}: no pictures in it")
    return files


def _is_picture(path: Path) -> bool:
    """Whether Pillow reads what such a file name promises."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.OPEN and path.is_file()


def load_square(path: str | Path, size: int) -> Tensor:
    """A picture as RGB, its centre square resized (bicubic): (3, size, size) float32 in [0, 1].

    Raises:
        OSError: not a readable image.
    """
    return load(path, (size, size))


def load(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture as RGB, its centre, of the shape of ``size``, resized (bicubic): (3, height, width) float32 in [0, 1].

    Raises:
        OSError: not a readable image.
    """
    height, width = size
    fitted = ImageOps.fit(upright(path), (width, height), Image.Resampling.BICUBIC)
    return to_tensor(fitted)


def upright(source: str | Path | BinaryIO) -> Image.Image:
    """A picture of any mode as RGB, turned as its EXIF orientation says, transparency on white.

    Integers of more than 8 bits count as 16-bit, floating-point values as [0, 1], or [0, 255] where one exceeds 1.

    Raises:
        OSError: not a readable image, or truncated.
    """
    try:
        with Image.open(source) as image:
            return _as_rgb(image)
    except OSError:
        raise
    except _DAMAGED as error:
        raise OSError(f"damaged, or too large ({error})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "F" or turned.mode.startswith("I"):
        return _eight_bits(turned).convert("RGB")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    layer = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of mode I, I;16 or F as L."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    top = values.max(initial=0)
    full = (65535 if top > 255 else 255) if image.mode != "F" else (255 if top > 1 else 1)
    return Image.fromarray(((values / full).clip(0, 1) * 255).round().astype(np.uint8))


def find(paths: Sequence[Path]) -> list[Path]:
    """The given files and the pictures in the given folders (not in folders within them), each folder's by name.

    Raises:
        FileNotFoundError: no such file or folder; no picture at all.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(filter(_is_picture, path.iterdir()))
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise FileNotFoundError(f"{', '.join(map(str, paths))}: no picture found")
    return found


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to (3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """(3, height, width), clamped to [0, 1] and rounded to 8 bits."""
    levels = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; an old file is replaced only when all is written."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
