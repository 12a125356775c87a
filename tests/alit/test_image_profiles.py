"""Color profiles: valid ones are applied, invalid ones are ignored."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from alit import colors
from alit.images import load, upright
from tests.helpers.hostile import mutated
from tests.helpers.image_files import P3, pixel, profile, saved

LINEAR = profile(curve=b"curv" + struct.pack(">II", 0, 0))
SRGB = profile()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
#: Gray profile of gamma 1: white point and one curve.
GRAY = (lambda body: struct.pack(">I", len(body) + 4) + body)(
    b"\0" * 4 + struct.pack(">I", 0x04200000) + b"mntrGRAYXYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249)) + b"\0" * 48
    + struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", 156, 20) + struct.pack(">4sII", b"kTRC", 176, 12)
    + b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249))
    + b"curv" + struct.pack(">II", 0, 0)
)  # fmt: skip
COLORS = ((200, 80, 60), (60, 120, 80), (60, 80, 190), (255, 255, 255), (0, 0, 0))


def converted(image: Image.Image, icc: bytes) -> Image.Image:
    own = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")


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
        assert np.allclose(upright(file, convert_profiles=False).getpixel((0, 0)), color, atol=4)
        (tmp_path / "x").write_bytes(file.getvalue())
        assert np.allclose(load(tmp_path / "x", (4, 4))[:, 0, 0] * 255, expected, atol=4)


def test_profiles_of_other_colors_than_rgb() -> None:
    for level in (0, 20, 100, 255):
        for file in (
            saved(Image.new("L", (8, 8), level), "PNG", icc_profile=GRAY),
            saved(Image.new("LA", (8, 8), (level, 255)), "PNG", icc_profile=GRAY),
            saved(
                Image.fromarray(np.full((8, 8), 257 * level, np.uint16)), "PNG", icc_profile=GRAY
            ),
        ):
            expected = converted(Image.new("L", (1, 1), level), GRAY).getpixel((0, 0))
            assert expected != (level,) * 3 or level in (0, 255)
            assert pixel(file) == expected
    lab = Image.new("LAB", (8, 8), (150, 160, 100))
    assert pixel(saved(lab, "TIFF", icc_profile=LAB)) == pixel(saved(lab, "TIFF"))


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "LAB", "I;16", "F"))
def test_profiles_that_are_none_are_ignored(mode: str) -> None:
    """Damaged profiles, and those of another color model than the image's, are ignored."""
    if mode in ("I;16", "LAB"):
        image = Image.new(mode, (8, 8), 30000 if mode == "I;16" else (150, 160, 100))
    else:
        image = Image.new("RGB", (8, 8), (200, 80, 60)).convert(mode)
    expected = pixel(saved(image, "TIFF"))
    chance = random.Random(0)
    wrong = [b"", b"nonsense", P3[:200], P3[:128], bytes(3000), b"\xff" * 500]
    wrong += [GRAY] if mode not in ("L", "LA", "1", "I;16", "F") else [P3]
    wrong += [LAB] if mode != "LAB" else []
    for icc in wrong:
        assert pixel(saved(image, "TIFF", icc_profile=icc)) == expected
    for _ in range(20):  # the image is read with any damage of its profile
        pixel(saved(image, "TIFF", icc_profile=mutated(P3, chance)))


def test_srgb_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(Image.new("RGB", (64, 64), (200, 80, 60)), "PNG", icc_profile=SRGB)
    assert colors.to_srgb(SRGB, "RGB") is None
    monkeypatch.setattr(ImageCms.ImageCmsTransform, "apply", None)
    assert pixel(file) == (200, 80, 60)
    calls = colors.to_srgb.cache_info().misses
    upright(file)
    assert colors.to_srgb.cache_info().misses == calls, "a profile is looked at once"
