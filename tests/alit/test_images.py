"""Images of every kind: orientation, ranges of values, transparency."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from alit.images import upright
from tests.helpers.image_files import SIGN, exif, orientation, pixel, png, saved

TURNED = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "MPO": {"quality": 95}}
if features.check("avif"):
    TURNED["AVIF"] = {"quality": 95, "subsampling": "4:4:4"}


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("kind", [*TURNED, "TIFF"])
def test_images_are_turned(kind: str, value: int) -> None:
    if kind == "TIFF":
        file = saved(SIGN, kind, tiffinfo={274: value}) if value else saved(SIGN, kind)
    else:
        if kind == "AVIF" and not 1 <= value <= 8:
            pytest.skip("Pillow writes no such AVIF")
        file = saved(SIGN, kind, exif=exif(orientation(value)), **TURNED[kind])
    tag = Image.Exif()
    tag[274] = value if 1 <= value <= 8 else 1
    stored = SIGN.copy()
    stored.info["exif"] = tag.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(stored), int)
    got = np.asarray(upright(file), int)
    assert got.shape == expected.shape and abs(got - expected).mean() < 6


DAMAGED_EXIF = {
    "text for a number": exif(orientation(6), (0x11A, 2, 4, b"72\0\0"), (0x128, 2, 1, b"x\0\0\0")),
    "offsets beyond the end": exif(
        (0x10F, 2, 99, b"\xff" * 4), orientation(6), (0x8769, 4, 1, b"\xff" * 4)
    ),
    "data cut off": exif(
        (0x10F, 2, 20, b"\x40\0\0\0"), orientation(6), (0x110, 2, 9, b"\x40\0\0\0")
    ),
    "one tag far away": exif(
        (0x10E, 2, 5, b"\xff" * 4), (0x110, 5, 1, b"\xff" * 4), orientation(6)
    ),
    "twice the header": b"Exif\0\0" + exif(orientation(6)),
    "no such type": exif((0x11A, 99, 1, b"\0" * 4), orientation(6), (0x11B, 0, 0, b"\0" * 4)),
    "a count of billions": exif(orientation(6), (0x9286, 7, 2**32 - 1, b"\x08\0\0\0")),
    "more entries than there are": exif(orientation(6), (0x11A, 5, 1, b"\x08\0\0\0"), count=500),
    "cut off": exif(orientation(6), *[(0x11A, 5, 1, b"\x08\0\0\0")] * 20)[:60],
    "big-endian": exif(orientation(6, order=">"), (0x11A, 2, 4, b"72\0\0"), order=">"),
    "a long": exif(orientation(6, kind=4)),
    "a byte": exif(orientation(6, kind=1)),
}
NO_ORIENTATION = {
    "text": exif((0x112, 2, 2, b"6\0\0\0")),
    "a fraction": exif((0x112, 5, 1, b"\xff" * 4)),
    "nothing": exif((0x112, 3, 0, b"\0" * 4)),
    "a large number": exif((0x112, 4, 1, b"\xff" * 4)),
    "no EXIF at all": b"Exif\0\0" + b"nonsense" * 4,
    "empty": b"Exif\0\0",
    "one byte": b"Exif\0\0I",
}


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "MPO"))
@pytest.mark.parametrize("damage", [*DAMAGED_EXIF, *NO_ORIENTATION])
def test_damaged_exif(kind: str, damage: str) -> None:
    """A damaged EXIF block leaves the image readable; an orientation that can be read is applied."""
    block = {**DAMAGED_EXIF, **NO_ORIENTATION}[damage]
    got = upright(saved(SIGN, kind, exif=block))
    assert got.size == ((32, 48) if damage in DAMAGED_EXIF else (48, 32))


# Modes and ranges of values.


def gray_tiff(data: bytes, bits: int, photometric: int, kind: int) -> io.BytesIO:
    """TIFF of 8 x 8 gray values, uncompressed, with ``bits`` bits each; 0 is white if ``photometric`` is 0."""
    entries = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, 8), (279, len(data)), (339, kind)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return io.BytesIO(head + struct.pack("<H", len(entries)) + directory + bytes(4))


@pytest.mark.parametrize(
    ("data", "bits", "photometric", "kind", "level"),
    [
        (bytes(128), 16, 0, 1, 255),
        (b"\xff" * 128, 16, 0, 1, 0),
        (b"\xff" * 96, 12, 1, 1, 255),
        (struct.pack("<I", 2**31) * 64, 32, 1, 1, 255),
        (struct.pack("<i", -5) * 64, 32, 1, 2, 0),
        (struct.pack("<i", 32768) * 64, 32, 1, 2, 128),
        (struct.pack("<i", 65536) * 64, 32, 1, 2, 255),
        (struct.pack("<h", -5) * 64, 16, 1, 2, 0),
        (struct.pack("<f", 0.2) * 64, 32, 0, 3, 204),
        (struct.pack("<f", float("nan")) * 64, 32, 0, 3, 0),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_tiff_says_what_its_numbers_mean(
    data: bytes, bits: int, photometric: int, kind: int, level: int
) -> None:
    assert upright(gray_tiff(data, bits, photometric, kind)).getpixel((4, 4)) == (level,) * 3


@pytest.mark.parametrize("value", (0, 200, 300, 32768, 65535))
def test_sixteen_bits(value: int) -> None:
    """65535 is white in 16-bit images, whatever the largest value."""
    numbers = np.full((8, 8), value, np.uint16)
    gray, expected = Image.fromarray(numbers), (round(value / 257),) * 3
    color = [struct.pack(">24H", *[value] * 24)] * 8
    alpha = [struct.pack(">32H", *[value, value, value, 65535] * 8)] * 8
    for file in (
        saved(gray, "PNG"),
        saved(gray, "TIFF"),
        saved(Image.fromarray(numbers.astype(np.int32)), "TIFF"),
        io.BytesIO(b"P5 8 8 65535 " + numbers.astype(">u2").tobytes()),
        png(16, 2, color, 8),
        png(16, 6, alpha, 8),
        png(16, 4, [struct.pack(">16H", *[value, 65535] * 8)] * 8, 8),
    ):
        assert np.allclose(pixel(file), expected, atol=1)


@pytest.mark.parametrize(
    "others, half, white",
    [
        ((), 0.5, 1), ((1.01,), 0.5, 1), ((1.5, -0.3), 0.5, 1), ((np.nan, np.inf, -np.inf), 0.5, 1),
        ((255.0,), 127.5, 255), ((np.nan, 300.0, -20.0), 127.5, 255), ((np.inf, 254.0), 127.5, 255),
    ],
)  # fmt: skip
def test_floating_point(others: tuple[float, ...], half: float, white: float) -> None:
    values = np.full((8, 8), half, np.float32)
    values[1, 0] = white
    values[0, : len(others)] = others
    image = np.asarray(upright(saved(Image.fromarray(values), "TIFF")), int)
    assert abs(image[4, 4] - 128).max() <= 1 and image[1, 0].tolist() == [255] * 3
    for value, got in zip(others, image[0, :, 0], strict=False):
        expected = 0 if np.isnan(value) else np.clip(value / white, 0, 1) * 255
        assert abs(got - expected) <= 1


@pytest.mark.parametrize("depth", (1, 2, 4, 8, 16))
def test_transparent_gray_lies_on_white(depth: int) -> None:
    """Pixels of the transparent gray become white; neighboring ones of other grays keep their value."""
    for clear in {0, 2**depth - 1, 2 ** (depth - 1) if depth > 1 else 0}:
        levels = [clear, 2**depth - 1 - clear] * 4
        bits = "".join(f"{level:0{depth}b}" for level in levels)
        row = int(bits, 2).to_bytes(depth, "big")
        file = png(depth, 0, [row] * 8, 8, (b"tRNS", struct.pack(">H", clear)))
        assert pixel(file) == (255, 255, 255)
        opaque = pixel(file, (1, 0))[0]
        assert abs(opaque - levels[1] * 255 / (2**depth - 1)) <= 1 or levels[1] == clear


@pytest.mark.parametrize("depth", (8, 16))
def test_transparent_color_lies_on_white(depth: int) -> None:
    scale = 257 if depth == 16 else 1
    colors = [(10, 200, 30), (30, 200, 10)]
    code = ">6H" if depth == 16 else ">6B"
    row = struct.pack(code, *(scale * x for color in colors for x in color))
    clear = struct.pack(">3H", *(scale * x for x in colors[0]))
    file = png(depth, 2, [row], 2, (b"tRNS", clear))
    assert pixel(file) == (255, 255, 255) and pixel(file, (1, 0)) == colors[1]
    high = struct.pack(">3H", *(256 + x for x in colors[0]))  # only the low 8 bits count
    if depth == 8:
        assert pixel(png(8, 2, [row], 2, (b"tRNS", high))) == (255, 255, 255)


def test_transparency_of_every_mode(tmp_path: Path) -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    for kind, mode in (
        ("PNG", "RGBA"),
        ("PNG", "LA"),
        ("WEBP", "RGBA"),
        ("TIFF", "RGBA"),
        ("TIFF", "LA"),
    ):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.allclose(pixel(saved(half.convert(mode), kind, **options)), 127, atol=1), (
            kind,
            mode,
        )
    palette = half.convert("RGB").quantize(4)
    assert np.allclose(pixel(saved(palette, "PNG", transparency=b"\x80" * 4)), 127, atol=1)
    assert pixel(saved(palette, "PNG", transparency=0)) in ((255,) * 3, (0,) * 3)
    assert pixel(saved(palette, "GIF", transparency=palette.getpixel((0, 0)))) == (255,) * 3


@pytest.mark.parametrize(
    "mode, kind",
    [
        *(("RGB", x) for x in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO", "JPEG2000")),
        *((x, "TIFF") for x in ("1", "L", "P", "CMYK", "LAB")), ("CMYK", "JPEG"), ("P", "GIF"),
    ],
)  # fmt: skip
def test_first_frame_of_every_mode_and_format(mode: str, kind: str) -> None:
    color = (255, 0, 0) if mode not in ("1", "L") else (255, 255, 255)
    image = Image.new("RGB", (16, 16), color)
    if mode == "LAB":
        srgb, lab = map(ImageCms.createProfile, ("sRGB", "LAB"))
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    options: dict[str, Any] = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    )
    if kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [Image.new(mode, (16, 16))]}
    file = saved(image.convert(mode), kind, **options)
    assert np.allclose(pixel(file), color, atol=6)
