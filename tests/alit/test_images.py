"""Pictures of every kind, what their color profiles and orientation tags say, and how much memory they take."""

from __future__ import annotations

import io
import itertools
import random
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from alit import colors, images
from alit.images import load, upright
from tests.helpers.hostile import EXAMPLES, memory, mutated

#: White above black, and left of the middle a red square: no two turns of it look alike.
SIGN = Image.new("RGB", (48, 32), "black")
SIGN.paste("white", (0, 0, 48, 16))
SIGN.paste("red", (0, 0, 16, 16))


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def pixel(file: io.BytesIO | Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    found = upright(file).getpixel(at)
    assert isinstance(found, tuple)
    return found


def png(
    depth: int, color: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]
) -> io.BytesIO:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return io.BytesIO(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts
        )
    )


# Orientation.


def exif(
    *entries: tuple[int, int, int, bytes], count: int | None = None, order: str = "<"
) -> bytes:
    """An EXIF block of tag, type, count and four bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    listed = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    number = struct.pack(order + "H", len(entries) if count is None else count)
    return b"Exif\0\0" + head + number + listed + b"\0" * 4


def orientation(value: int, kind: int = 3, order: str = "<") -> tuple[int, int, int, bytes]:
    number = {1: "Bxxx", 3: "Hxx", 4: "I"}[kind]
    return 0x112, kind, 1, struct.pack(order + number, value)


TURNED = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "MPO": {"quality": 95}}
if features.check("avif"):
    TURNED["AVIF"] = {"quality": 95, "subsampling": "4:4:4"}


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("kind", [*TURNED, "TIFF"])
def test_pictures_are_turned(kind: str, value: int) -> None:
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


@pytest.mark.parametrize("size", ((480, 320), (320, 480), (2000, 70), (70, 2000)))
@pytest.mark.parametrize("value", (1, 3, 5, 6, 7, 8))
def test_large_pictures_are_turned_when_they_are_small(
    value: int, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 10, size[0] // 10, 3), np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(noise).resize(size).save(path, exif=exif(orientation(value)))
    for shape in ((16, 16), (16, 24), (40, 24)):
        before = load(path, shape)
        fitted = ImageOps.fit(upright(path), shape[::-1], Image.Resampling.BICUBIC)
        assert torch.equal(before, images.to_tensor(fitted))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_SPARE", 0)
            patch.setattr(tempfile, "TemporaryFile", None)
            difference = (load(path, shape) - before).abs()
            assert difference.mean() < 0.2 / 255, "but for rounding"
            assert difference.max() < 6 / 255, "and for what is clipped between rows and columns"


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
    """A sound picture stays readable, and an orientation that can be read counts."""
    block = {**DAMAGED_EXIF, **NO_ORIENTATION}[damage]
    got = upright(saved(SIGN, kind, exif=block))
    assert got.size == ((32, 48) if damage in DAMAGED_EXIF else (48, 32))


# Color profiles.


def profile(*primaries: tuple[float, float, float], curve: bytes | None = None) -> bytes:
    """sRGB's profile, of other primaries (XYZ, D50) or with another curve."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", raw[128:132])[0]):
        name, offset, size = struct.unpack(">4sII", raw[132 + 12 * i : 144 + 12 * i])
        for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False):
            if name == tag:
                raw[offset + 8 : offset + 20] = b"".join(
                    struct.pack(">i", round(v * 65536)) for v in xyz
                )
        if name[1:] == b"TRC" and curve is not None:
            raw[offset : offset + size] = curve.ljust(size, b"\0")[:size]
    return bytes(raw)


P3 = profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
LINEAR = profile(curve=b"curv" + struct.pack(">II", 0, 0))
SRGB = profile()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
#: Grey of gamma 1: white point and one curve.
GREY = (lambda body: struct.pack(">I", len(body) + 4) + body)(
    b"\0" * 4 + struct.pack(">I", 0x04200000) + b"mntrGRAYXYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249)) + b"\0" * 48
    + struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", 156, 20) + struct.pack(">4sII", b"kTRC", 176, 12)
    + b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249))
    + b"curv" + struct.pack(">II", 0, 0)
)  # fmt: skip
COLORS = ((200, 80, 60), (60, 120, 80), (60, 80, 190), (255, 255, 255), (0, 0, 0))


def converted(image: Image.Image, icc: bytes) -> Image.Image:
    own = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    done = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert done is not None
    return done


@pytest.mark.parametrize("icc", (P3, LINEAR), ids=("Display P3", "linear"))
@pytest.mark.parametrize(
    "kind, mode",
    [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("TIFF", "RGB"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        ("MPO", "RGB"),
    ],
)
def test_color_profiles(kind: str, mode: str, icc: bytes, tmp_path: Path) -> None:
    for color in COLORS:
        image = Image.new("RGB", (16, 16), color)
        options = (
            {"lossless": True}
            if kind == "WEBP"
            else {"quality": 100}
            if kind in ("JPEG", "MPO")
            else {}
        )
        shown = image.quantize(4) if mode == "P" else image.convert(mode)
        file = saved(shown, kind, icc_profile=icc, **options)
        expected = converted(image, icc).getpixel((0, 0))
        assert np.allclose(pixel(file), expected, atol=4), (color, expected)
        assert np.allclose(upright(file, convert_profiles=False).getpixel((0, 0)), color, atol=4)  # type: ignore[arg-type]
        (tmp_path / "x").write_bytes(file.getvalue())
        assert np.allclose(load(tmp_path / "x", (4, 4))[:, 0, 0] * 255, expected, atol=4)


def test_profiles_of_other_colors_than_rgb() -> None:
    for level in (0, 20, 100, 255):
        for file in (
            saved(Image.new("L", (8, 8), level), "PNG", icc_profile=GREY),
            saved(Image.new("LA", (8, 8), (level, 255)), "PNG", icc_profile=GREY),
            saved(
                Image.fromarray(np.full((8, 8), 257 * level, np.uint16)), "PNG", icc_profile=GREY
            ),
        ):
            expected = converted(Image.new("L", (1, 1), level), GREY).getpixel((0, 0))
            assert expected != (level,) * 3 or level in (0, 255)
            assert pixel(file) == expected
    lab = Image.new("LAB", (8, 8), (150, 160, 100))
    assert pixel(saved(lab, "TIFF", icc_profile=LAB)) == pixel(saved(lab, "TIFF"))


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "LAB", "I;16", "F"))
def test_profiles_that_are_none_are_ignored(mode: str) -> None:
    """Damaged ones, and those of other colors than the picture's."""
    if mode in ("I;16", "LAB"):
        image = Image.new(mode, (8, 8), 30000 if mode == "I;16" else (150, 160, 100))
    else:
        image = Image.new("RGB", (8, 8), (200, 80, 60)).convert(mode)
    expected = pixel(saved(image, "TIFF"))
    chance = random.Random(0)
    wrong = [b"", b"nonsense", P3[:200], P3[:128], bytes(3000), b"\xff" * 500]
    wrong += [GREY] if mode not in ("L", "LA", "1", "I;16", "F") else [P3]
    wrong += [LAB] if mode != "LAB" else []
    for icc in wrong:
        assert pixel(saved(image, "TIFF", icc_profile=icc)) == expected
    for _ in range(20):  # whatever it says now, the picture is read
        pixel(saved(image, "TIFF", icc_profile=mutated(P3, chance)))


def test_srgb_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(Image.new("RGB", (64, 64), (200, 80, 60)), "PNG", icc_profile=SRGB)
    assert colors.to_srgb(SRGB, "RGB") is None
    monkeypatch.setattr(ImageCms.ImageCmsTransform, "apply", None)
    assert pixel(file) == (200, 80, 60)
    calls = colors.to_srgb.cache_info().misses
    upright(file)
    assert colors.to_srgb.cache_info().misses == calls, "a profile is looked at once"


# Modes and numbers.


def grey_tiff(data: bytes, bits: int, photometric: int, kind: int) -> io.BytesIO:
    """8 x 8 numbers, uncompressed, of so many bits; 0 is white where ``photometric`` is 0."""
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
        (struct.pack("<h", -5) * 64, 16, 1, 2, 0),
        (struct.pack("<f", 0.2) * 64, 32, 0, 3, 204),
        (struct.pack("<f", float("nan")) * 64, 32, 0, 3, 0),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_tiff_says_what_its_numbers_mean(
    data: bytes, bits: int, photometric: int, kind: int, level: int
) -> None:
    assert upright(grey_tiff(data, bits, photometric, kind)).getpixel((4, 4)) == (level,) * 3


@pytest.mark.parametrize("value", (0, 200, 300, 32768, 65535))
def test_sixteen_bits(value: int) -> None:
    """Whatever the largest number in it, 65535 is white."""
    numbers = np.full((8, 8), value, np.uint16)
    grey, expected = Image.fromarray(numbers), (round(value / 257),) * 3
    color = [struct.pack(">24H", *[value] * 24)] * 8
    alpha = [struct.pack(">32H", *[value, value, value, 65535] * 8)] * 8
    for file in (
        saved(grey, "PNG"),
        saved(grey, "TIFF"),
        saved(Image.fromarray(numbers.astype(np.int32)), "TIFF"),
        io.BytesIO(b"P5 8 8 65535 " + numbers.astype(">u2").tobytes()),
        png(16, 2, color, 8),
        png(16, 6, alpha, 8),
        png(16, 4, [struct.pack(">16H", *[value, 65535] * 8)] * 8, 8),
    ):
        assert np.allclose(pixel(file), expected, atol=1)


def test_whole_numbers_beyond_16_bits_are_clipped() -> None:
    numbers = np.array([[-5, 0, 32768, 65535, 65536, 2**31 - 1]], np.int32)
    row = np.asarray(upright(saved(Image.fromarray(numbers), "TIFF")))[0, :, 0]
    assert row.tolist() == [0, 0, 128, 255, 255, 255]


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
    picture = np.asarray(upright(saved(Image.fromarray(values), "TIFF")), int)
    assert abs(picture[4, 4] - 128).max() <= 1 and picture[1, 0].tolist() == [255] * 3
    for value, got in zip(others, picture[0, :, 0], strict=False):
        expected = 0 if np.isnan(value) else np.clip(value / white, 0, 1) * 255
        assert abs(got - expected) <= 1


@pytest.mark.parametrize("depth", (1, 2, 4, 8, 16))
def test_transparent_grey_lies_on_white(depth: int) -> None:
    """And what is next to the transparent grey stays."""
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
    high = struct.pack(">3H", *(256 + x for x in colors[0]))  # of which 8 bits count
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
    picture = Image.new("RGB", (16, 16), color)
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
        )
        assert converted is not None
        picture = converted
    options: dict[str, Any] = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    )
    if kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options |= {"save_all": True, "append_images": [Image.new(mode, (16, 16))]}
    file = saved(picture.convert(mode), kind, **options)
    assert np.allclose(pixel(file), color, atol=6)


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "P", "I;16", "CMYK", "F"))
@pytest.mark.parametrize("turn", (1, 2, 6, 7))
@pytest.mark.parametrize("spare", (0, 10**9), ids=("by a file", "in memory"))
def test_large_pictures_are_those_of_one_tile(
    mode: str, turn: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles, and the temporary file, change nothing."""
    chance = np.random.default_rng(0)
    if mode in ("I;16", "F"):
        data = chance.random((70, 100)) * (65535 if mode == "I;16" else 1)
        picture = Image.fromarray(data.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        picture = Image.fromarray(chance.integers(0, 255, (70, 100, 4), np.uint8)).convert(mode)
    kind = "TIFF" if mode in ("F", "CMYK") else "PNG"
    file = saved(picture, kind, icc_profile=P3)
    monkeypatch.setattr(images, "_turn", lambda _: images._TURNS.get(turn))
    whole = upright(file)
    monkeypatch.setattr(images, "_TILE", 32)
    monkeypatch.setattr(images, "_SPARE", spare)
    assert upright(file).tobytes() == whole.tobytes()
    tag = Image.Exif()
    tag[274] = turn
    monkeypatch.undo()
    flat = upright(file)
    flat.info["exif"] = tag.tobytes()
    flat.getexif()[274] = turn
    assert whole.tobytes() == ImageOps.exif_transpose(flat).tobytes()


# Sizes and memory.


def test_the_limit_is_read_in_the_header(tmp_path: Path) -> None:
    """Before anything is decoded, without a warning, and Pillow's own limit is what it was."""
    huge = png(1, 0, [b"\0"], 8)
    data = bytearray(huge.getvalue())
    data[16:24] = struct.pack(">II", 20000, 12501)  # 250.02 megapixels
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "huge.png").write_bytes(data)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(), memory() as used:
        warnings.simplefilter("error")
        for read in (upright, lambda x: load(x, (8, 8))):
            with pytest.raises(OSError, match="too large: more than 250 megapixels"):
                read(tmp_path / "huge.png")
        with pytest.raises(OSError, match=r"too large: more than 0\.001 megapixels"):
            upright(saved(SIGN, "PNG"), max_megapixels=0.001)
    assert used.taken < 20e6 and before == Image.MAX_IMAGE_PIXELS
    assert upright(saved(SIGN, "PNG"), max_megapixels=0.002).size == SIGN.size
    with pytest.raises(ValueError, match="max_megapixels: expected a number above 0, got nan"):
        upright(saved(SIGN, "PNG"), max_megapixels=float("nan"))


def test_no_warning_between_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert upright(saved(SIGN, "PNG")).size == SIGN.size
    assert Image.MAX_IMAGE_PIXELS == 500


def test_threads_leave_the_limit_as_it_was() -> None:
    before, file = Image.MAX_IMAGE_PIXELS, saved(SIGN, "PNG").getvalue()
    threads = [
        threading.Thread(target=lambda: [upright(io.BytesIO(file)) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_decoders_that_need_more_are_held_to_the_same_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5 bytes for each of ``max_megapixels``, whatever the format."""
    monkeypatch.setattr(images, "_SPARE", 0)
    pictures = SIGN.size[0] * SIGN.size[1] / 1e6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    for file, needed in (
        (saved(SIGN, "WEBP"), 20),
        (saved(SIGN, "JPEG", progressive=True, subsampling=0), 10),
        (saved(SIGN, "JPEG", progressive=True, subsampling=2), 7),
        (saved(SIGN.convert("CMYK"), "JPEG", progressive=True), 12),
        (saved(noise, "TIFF", compression="tiff_lzw", strip_size=10**6), 7),
        (saved(SIGN, "JPEG"), 5),
        (saved(SIGN, "TIFF"), 4),
    ):
        allowed = max(pictures, pictures * needed / 5)
        assert upright(file, max_megapixels=allowed * 1.001).size == SIGN.size
        with pytest.raises(OSError, match="too large"):
            upright(file, max_megapixels=allowed * 0.999)


BIG = (3000, 2000)
LARGE: dict[str, Callable[[Image.Image], tuple[Image.Image, str, dict[str, Any]]]] = {
    "PNG": lambda x: (x, "PNG", {"compress_level": 1}),
    "PNG, transparent": lambda x: (x.convert("RGBA"), "PNG", {"compress_level": 1}),
    "PNG of a palette": lambda x: (x.quantize(16, method=2), "PNG", {"compress_level": 1}),
    "PNG of 1 bit": lambda x: (x.convert("1"), "PNG", {"compress_level": 1}),
    "PNG, Display P3": lambda x: (x, "PNG", {"compress_level": 1, "icc_profile": P3}),
    "JPEG": lambda x: (x, "JPEG", {}),
    "JPEG, turned": lambda x: (x, "JPEG", {"exif": exif(orientation(6))}),
    "JPEG, CMYK": lambda x: (x.convert("CMYK"), "JPEG", {}),
    "TIFF": lambda x: (x, "TIFF", {}),
    "TIFF, 16 bits": lambda x: (x.convert("I;16"), "TIFF", {}),
    "TIFF, floating-point": lambda x: (x.convert("F"), "TIFF", {}),
    "BMP": lambda x: (x, "BMP", {}),
    "GIF": lambda x: (x.quantize(16, method=2), "GIF", {}),
}


@pytest.mark.parametrize("kind", LARGE)
def test_five_bytes_a_pixel(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the file, and a constant that is made small here."""
    monkeypatch.setattr(images, "_SPARE", 2_000_000)
    monkeypatch.setattr(images, "_TILE", 256)
    small = np.random.default_rng(0).integers(0, 255, (BIG[1] // 50, BIG[0] // 50, 3), np.uint8)
    picture, name, options = LARGE[kind](Image.fromarray(small).resize(BIG))
    path = tmp_path / "x"
    picture.save(path, name, **options)
    del picture
    upright(saved(SIGN, "PNG"))
    for read in (upright, lambda x: load(x, (64, 64))):
        with memory() as used:
            read(path)
        assert used.taken <= 5 * BIG[0] * BIG[1] + path.stat().st_size + 10e6


def seeds() -> dict[str, bytes]:
    """A small picture of every format that Pillow writes, with what can be wrong in it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 4), np.uint8))
    rgb, tag = noise.convert("RGB"), exif(orientation(6), (0x11A, 5, 1, b"\x08\0\0\0"))
    deep = Image.fromarray(np.asarray(noise)[..., 0].astype(np.uint16) * 257)
    palette, two = rgb.quantize(16), {"save_all": True, "append_images": [rgb]}
    extra: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "PNG": (rgb, {"exif": tag, "icc_profile": P3}),
        "PNG RGBA": (noise, {}),
        "PNG P": (palette, {"transparency": b"\x80" * 16}),
        "PNG 16": (deep, {}),
        "JPEG": (rgb, {"exif": tag, "icc_profile": P3}),
        "JPEG progressive": (rgb, {"progressive": True}),
        "JPEG CMYK": (rgb.convert("CMYK"), {}),
        "MPO": (rgb, two),
        "TIFF": (rgb, {"icc_profile": P3, "tiffinfo": {274: 6}}),
        "TIFF LZW": (noise, {"compression": "tiff_lzw"}),
        "TIFF JPEG": (rgb, {"compression": "jpeg"}),
        "TIFF G4": (rgb.convert("1"), {"compression": "group4"}),
        "TIFF F": (rgb.convert("F"), {}),
        "GIF": (palette, two),
        "WEBP": (rgb, {"exif": tag, "icc_profile": P3}),
        "WEBP lossless": (noise, {"lossless": True}),
    }
    made = {
        name: saved(image, name.split()[0], **options).getvalue()
        for name, (image, options) in extra.items()
    }
    Image.init()
    for name in sorted(set(Image.SAVE) & set(images.formats()) - {x.split()[0] for x in extra}):
        for image in (rgb, noise, rgb.convert("L"), rgb.convert("1"), rgb.convert("F")):
            try:
                made[name] = saved(image, name).getvalue()
                upright(io.BytesIO(made[name]))
                break
            except (OSError, ValueError, KeyError, RuntimeError):
                made.pop(name, None)
    return made


def test_mutated_pictures(tmp_path: Path) -> None:
    """Nothing but OSError, and memory as for a sound picture of that header."""
    chance, pictures = random.Random(0), seeds()
    assert len(pictures) >= 25, sorted(pictures)
    for number, name in zip(range(EXAMPLES), itertools.cycle(pictures), strict=False):
        data = mutated(pictures[name], chance)
        path = tmp_path / "x"
        path.write_bytes(data)
        pixels, each = 0, 5.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(path, formats=images.formats()) as image:
                    pixels = image.size[0] * image.size[1]
                    each = max(each, images._decoder_bytes(image))
            except Exception:
                pass  # what upright makes of that is looked at below
        reads = (lambda: upright(io.BytesIO(data)), lambda: load(path, (16, 16)))  # noqa: B023
        with memory() as used:
            try:
                found: Any = reads[number % 2]()
            except OSError:
                found = None
        assert used.taken <= each * pixels + 100e6, (name, number)
        if pixels > 250e6:
            assert found is None and used.taken < 50e6, (name, number)
        if isinstance(found, torch.Tensor):
            assert found.shape == (3, 16, 16) and bool(torch.isfinite(found).all())
        elif found is not None:
            assert found.mode == "RGB"
