"""Fitting of images of any shape to a model, and of decoded images to the size of their originals.

- ``whole``: all of it, resized to about as many pixels as the model's own images have; each side is the multiple of the
  patch that is nearest to the original's shape.
- ``crop``: its center, of the model's own shape and size.
- ``pad``: all of it, made smaller where it has more pixels than the model's images but never larger, its last row and
  column repeated up to multiples of the patch.

An image that is longer than one row of patches with as many pixels is squeezed, which bounds its cost, see
:func:`most_tokens`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import pad

from .images import MAX_MEGAPIXELS, to_image, to_tensor, upright

FITS = ("whole", "crop", "pad")
#: Pillow's ``reducing_gap``: sides are first divided by integers, to at least this many times the wanted ones, as a
#: filter that reaches over more pixels takes memory for each of them.
GAP = 8.0


def most_tokens(own: int) -> int:
    """Largest number of image tokens of an image of any shape, for a model whose own images have ``own``.

    With the exact sides a and b in patches, a b <= own and b <= own, sides rounded up make (a + 1) (b + 1) patches.
    """
    return 2 * own + 2


class Fitted(NamedTuple):
    """Image fitted to a model, with its original size and padding.

    Attributes:
        image: (3, height, width) float32 in [0, 1], sides multiples of the patch.
        original: height and width in pixels of the file's image, or of the part of it that was taken.
        padding: rows at the bottom and columns at the right that were added.
    """

    image: Tensor
    original: tuple[int, int]
    padding: tuple[int, int]


def load(
    path: str | Path,
    image_size: tuple[int, int],
    patch: int,
    fit: str,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Fitted:
    """Image of a file, fitted to a model.

    Args:
        image_size, patch: of the model, in pixels.
        fit: one of ``FITS``.

    Raises:
        OSError: as :func:`alit.images.upright`.
    """
    return fitted(upright(path, max_megapixels=max_megapixels), image_size, patch, fit)


def fitted(pil_image: Image.Image, image_size: tuple[int, int], patch: int, fit: str) -> Fitted:
    """RGB image fitted to a model; arguments as for :func:`load`."""
    width, height = pil_image.size
    if fit == "crop":
        rows, columns = image_size
        share = min(height / rows, width / columns)
        part = max(1, round(share * rows)), max(1, round(share * columns))
        cut = ImageOps.fit(pil_image, (columns, rows), Image.Resampling.BICUBIC)
        return Fitted(to_tensor(cut), part, (0, 0))
    area = math.prod(image_size)
    scale = min(math.sqrt(area / (height * width)), area / patch / max(height, width))
    if fit == "whole":
        rows, columns = (patch * max(1, round(x * scale / patch)) for x in (height, width))
    else:
        rows, columns = (max(1, round(x * min(1.0, scale))) for x in (height, width))
    size = (columns, rows)
    image = to_tensor(pil_image.resize(size, Image.Resampling.BICUBIC, reducing_gap=GAP))
    below, beside = -rows % patch, -columns % patch
    if below or beside:
        image = pad(image[None], (0, beside, 0, below), mode="replicate")[0]
    return Fitted(image, (height, width), (below, beside))


def without_padding(image: Tensor, padding: tuple[int, int]) -> Tensor:
    """Image (3, height, width) without the rows and columns of its padding."""
    height, width = (side - added for side, added in zip(image.shape[1:], padding, strict=True))
    return image[:, :height, :width]


def restored(image: Tensor, padding: tuple[int, int], original: tuple[int, int]) -> Image.Image:
    """Decoded image without padding, resized (bicubic) to the original's size unless that is unknown, (0, 0)."""
    pil_image, (height, width) = to_image(without_padding(image, padding)), original
    if original == (0, 0):
        return pil_image
    return pil_image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=GAP)
