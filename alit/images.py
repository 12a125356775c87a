"""Reading and writing images: any kind and orientation in, float tensors in [0, 1] out.

Every command, evaluation and training read through :func:`upright` or :func:`load`, by the same rules:

- The first frame counts, turned as its orientation tag says; transparency lies on white.
- An embedded color profile is converted to sRGB (perceptual intent); one that is damaged, or not of the image's colors,
  is ignored.
- Integers of more than 8 bits are divided by 65535 and clipped; floating-point values count as [0, 1], or as [0, 255]
  where one is finite and above 2, and are clipped; NaN is black.
- Memory: 5 bytes a pixel beyond the file, and some tens of megabytes. ``_BYTES`` names decoders that take more;
  an image for which they would exceed 5 bytes times ``max_megapixels`` is refused like one with more pixels, before
  anything is decoded. What does not fit in memory meanwhile lies in a temporary file, 3 bytes a pixel.
"""

from __future__ import annotations

import itertools
import struct
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .atomic_files import replacing
from .colors import DAMAGED, Box, eight_bits, scale, to_rgb, to_srgb

#: Images with more megapixels, by their header, are refused unless a caller says otherwise.
MAX_MEGAPIXELS = 250.0
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
#: Formats of Pillow that are not read: programs (PostScript), videos, measurements.
_LEFT_OUT = ("EPS", "MPEG", "BUFR", "GRIB", "HDF5")
#: Peak bytes per pixel of decoders that may take more than 5.
_BYTES = {"WEBP": 20, "AVIF": 16, "HEIF": 16, "JPEG2000": 26, "DDS": 8, "QOI": 8, "SGI": 7}
#: Bytes per pixel of a decoded image, by mode; 4 for others.
_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
#: EXIF types that an orientation may have (byte, short, long), and their ``struct`` formats.
_INTEGERS = {1: "B", 3: "H", 4: "I"}
#: Side of the tiles that are converted at a time, and bytes beyond 5 a pixel that a small image may take.
_TILE, _SPARE = 1024, 48_000_000
#: Pillow's limit of pixels and Python's filters of warnings belong to the process: one reading at a time.
_LOCK = threading.RLock()


class _Turn(NamedTuple):
    """A transposition: Pillow's method; columns mirrored, rows mirrored, then both exchanged (``sideways``)."""

    method: Image.Transpose
    columns: bool
    rows: bool
    sideways: bool


_TURNS = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, True, False, False),
    3: _Turn(Image.Transpose.ROTATE_180, True, True, False),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, True, False),
    5: _Turn(Image.Transpose.TRANSPOSE, False, False, True),
    6: _Turn(Image.Transpose.ROTATE_270, False, True, True),
    7: _Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: _Turn(Image.Transpose.ROTATE_90, True, False, True),
}


def load_square(path: str | Path, size: int, *, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """Load an image as a square, (3, size, size) float32, by :func:`load`."""
    return load(path, (size, size), max_megapixels=max_megapixels)


def load(
    path: str | Path, size: tuple[int, int], *, max_megapixels: float = MAX_MEGAPIXELS
) -> Tensor:
    """Load an image's center in the shape of ``size``, resized (bicubic), as RGB (3, height, width) float32 in [0, 1].

    Raises:
        OSError: not a readable image, or one of more than ``max_megapixels``.
    """
    height, width = size
    with _decoded(path, max_megapixels) as image:
        turn = _turn(image)
        # A large image is turned once resized: the same, but for rounding and whether rows or columns come first.
        late = turn if 3 * image.size[0] * image.size[1] > _SPARE else None
        whole = _whole(image, turn if late is None else None, convert_profiles=True)
    if late is None:
        return to_tensor(ImageOps.fit(whole, (width, height), Image.Resampling.BICUBIC))
    shape = (height, width) if late.sideways else (width, height)
    return to_tensor(ImageOps.fit(whole, shape, Image.Resampling.BICUBIC).transpose(late.method))


def upright(
    source: str | Path | BinaryIO,
    *,
    convert_profiles: bool = True,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Image.Image:
    """Whole image as RGB, turned by its orientation tag, transparency on white; the module's docstring has the rules.

    Raises:
        OSError: not a readable image, or truncated, or one of more than ``max_megapixels``.
    """
    with _decoded(source, max_megapixels) as image:
        return _whole(image, _turn(image), convert_profiles=convert_profiles)


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Names of the formats that are read: Pillow's and, where it is installed, pillow-heif's."""
    Image.init()
    with suppress(ModuleNotFoundError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in _LEFT_OUT)


@contextmanager
def _decoded(source: str | Path | BinaryIO, max_megapixels: float) -> Iterator[Image.Image]:
    """Context manager: the decoded first frame, as it lies in the file; errors within become ``OSError``."""
    if not max_megapixels > 0:
        raise ValueError(f"max_megapixels: expected a number above 0, got {max_megapixels}")
    limit = max_megapixels * 1e6
    try:
        with _limit(limit), Image.open(source, formats=formats()) as image:
            needed = int(image.size[0] * image.size[1] * _decoder_bytes(image))
            if needed > 5 * limit + _SPARE:
                size = f"{image.size[0]} x {image.size[1]} pixels of {image.format}"
                raise OSError(
                    f"too large: {size} take {needed / 1e9:.2f} GB, more than {limit / 2e8:g} GB"
                )
            _scale_transparency(image)
            if not isinstance(image.info.get("xmp", b""), (bytes, str)):
                del image.info["xmp"]  # Pillow would look for an orientation in it
            image.load()
            yield image
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("cannot identify what kind of image it is") from error
    except OSError:
        raise
    except _TOO_LARGE as error:
        raise OSError(f"too large: more than {max_megapixels:g} megapixels") from error
    except DAMAGED as error:
        raise OSError(f"damaged, or too large ({error})") from error


@contextmanager
def _limit(pixels: float) -> Iterator[None]:
    """Context manager: Pillow raises if an image has more pixels, and warns of nothing else; restored at the end."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels  # type: ignore[assignment]
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decoder_bytes(image: Any) -> float:
    """Peak bytes per pixel of decoding an image, those of the decoded image included."""
    if image.info.get("progressive"):  # JPEG: all coefficients at once, 16 bits each
        across, down = zip(*(layer[1:3] for layer in image.layer), strict=True)
        samples = sum(a * b for a, b in zip(across, down, strict=True))
        return 4 + 2 * samples / (max(across) * max(down))
    if image.format == "TIFF":  # a strip or tile at once, of any size
        tag, (width, height), names = image.tag_v2.get, image.size, ExifTags.Base
        rows = min(height, tag(names.TileLength, tag(names.RowsPerStrip, height)))
        share = rows * min(width, tag(names.TileWidth, width)) / (width * height)
        buffer = (
            0 if tag(names.Compression, 1) == 1 else share * sum(tag(names.BitsPerSample, (1,))) / 8
        )
        turned = 0 if tag(names.Orientation, 1) == 1 else 4  # a second image, by Pillow itself
        return 4 + max(turned, buffer)
    return _BYTES.get(image.format, 5)


def _scale_transparency(image: Any) -> None:
    """Scale a PNG's transparent color to the decoded pixels' 8 bits; Pillow leaves 2, 4 and 16 bits as in the file."""
    clear = image.info.get("transparency")
    if clear is None or image.format != "PNG" or not image.tile:
        return
    kind = image.tile[0][3]
    if kind in ("L", "L;2", "L;4"):
        most = {"L": 255, "L;2": 3, "L;4": 15}[kind]
        image.info["transparency"] = (clear & most) * (255 // most)
    elif kind in ("RGB", "RGB;16B"):
        shift = 8 if kind == "RGB;16B" else 0
        image.info["transparency"] = tuple((level >> shift) & 255 for level in clear)


def _turn(image: Image.Image) -> _Turn | None:
    """Transposition that the orientation tag asks for; None without a tag, or for one that is no number from 2 to 8."""
    for read in (_exif_orientation, _other_orientation):
        with suppress(OSError, *DAMAGED):  # no such tag can be read
            if (value := read(image)) is not None:
                return _TURNS.get(value)
    return None


def _exif_orientation(image: Image.Image) -> int | None:
    """Orientation in the first directory of an EXIF block, which may be damaged elsewhere or cut off; else None."""
    block = image.info.get("exif", b"")
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II": "<", b"MM": ">"}[block[:2]]
    (start,) = struct.unpack_from(order + "I", block, 4)
    (count,) = struct.unpack_from(order + "H", block, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", block, entry)
        if tag == ExifTags.Base.Orientation and kind in _INTEGERS and number > 0:
            return struct.unpack_from(order + _INTEGERS[kind], block, entry + 8)[0]
    return None


def _other_orientation(image: Image.Image) -> int | None:
    """Orientation that Pillow finds elsewhere, in XMP or text of PNG; None if absent. (Pillow turns TIFFs itself.)"""
    value = image.getexif().get(ExifTags.Base.Orientation)
    if isinstance(value, (bytes, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) else None


def _whole(image: Image.Image, turn: _Turn | None, *, convert_profiles: bool) -> Image.Image:
    """Convert the decoded image to RGB and turn it, tile by tile; ``image`` itself is used up."""
    profile = image.info.get("icc_profile") if convert_profiles else None
    plain = image.mode == "RGB" and not image.has_transparency_data
    if plain and turn is None and (not profile or to_srgb(profile, "RGB") is None):
        return image
    (width, height), steps = image.size, (range(0, side, _TILE) for side in image.size)
    boxes = [
        (x, y, min(x + _TILE, width), min(y + _TILE, height)) for x, y in itertools.product(*steps)
    ]
    numbers = image.mode == "F" or image.mode.startswith("I")
    levels = scale(image, boxes) if numbers else None

    def tile(box: Box) -> Image.Image:
        part = image.crop(box)
        rgb = to_rgb(part if levels is None else eight_bits(part, levels), profile)
        return rgb if turn is None else rgb.transpose(turn.method)

    if image.mode == "RGB" and turn is None:
        for box in boxes:
            image.paste(tile(box), box[:2])
        image.info.clear()
        return image
    tiles = (tile(box) for box in boxes)
    if (_MODES.get(image.mode, 4) - 1) * width * height <= _SPARE:
        return _pasted(tiles, boxes, image.size, turn)
    with tempfile.TemporaryFile() as file:
        sizes = []
        for part in tiles:
            file.write(part.tobytes())
            sizes.append(part.size)
        image.thumbnail((1, 1), Image.Resampling.NEAREST)  # frees the image's memory
        file.seek(0)
        tiles = (Image.frombytes("RGB", (w, h), file.read(3 * w * h)) for w, h in sizes)
        return _pasted(tiles, boxes, (width, height), turn)


def _pasted(
    tiles: Iterator[Image.Image], boxes: list[Box], size: tuple[int, int], turn: _Turn | None
) -> Image.Image:
    (width, height), (_, columns, rows, sideways) = size, turn or (None, False, False, False)
    whole = Image.new("RGB", (height, width) if sideways else size)
    for part, (left, top, right, bottom) in zip(tiles, boxes, strict=True):
        x, y = width - right if columns else left, height - bottom if rows else top
        whole.paste(part, (y, x) if sideways else (x, y))
    return whole


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels of any shape, clamped to [0, 1] and rounded to 8 bits: uint8 of that shape."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """Image of pixels (3, height, width), clamped to [0, 1] and rounded to 8 bits."""
    return Image.fromarray(to_levels(pixels.detach().float()).permute(1, 2, 0).cpu().numpy())


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; an old file is replaced only when all is written."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
