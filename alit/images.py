"""Reading and writing pictures: any mode and orientation in, float tensors in [0, 1] out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .files import replacing


def list_images(folder: str | Path) -> list[Path]:
    """Files with the suffix of a picture in a folder and the folders in it, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder}: not a folder")
    next(folder.iterdir(), None)  # rglob passes over a folder that cannot be read; this raises
    suffixes = Image.registered_extensions()
    files = sorted(x for x in folder.rglob("*") if x.suffix.lower() in suffixes and x.is_file())
    if not files:
        raise ValueError(f"{folder}: no pictures in it")
    return files


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
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return to_tensor(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))


def find(paths: Sequence[Path]) -> list[Path]:
    """The given files and the pictures in the given folders (not in folders within them), each folder's by name.

    Raises:
        FileNotFoundError: no such file or folder; no picture at all.
    """
    known = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in known.items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
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
