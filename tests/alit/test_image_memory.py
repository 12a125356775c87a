"""Sizes and memory of images: the limit, decoders that need more memory, tiles; and damaged files."""

from __future__ import annotations

import io
import itertools
import random
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from alit import images
from alit.images import load, upright
from tests.helpers.hostile import EXAMPLES, memory, mutated
from tests.helpers.image_files import P3, SIGN, exif, orientation, png, saved


@pytest.mark.parametrize("size", ((480, 320), (320, 480), (2000, 70), (70, 2000)))
@pytest.mark.parametrize("value", (1, 3, 5, 6, 7, 8))
def test_large_images_are_turned_when_they_are_small(
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


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "P", "I;16", "CMYK", "F"))
@pytest.mark.parametrize("turn", (1, 2, 6, 7))
@pytest.mark.parametrize("spare", (0, 10**9), ids=("by a file", "in memory"))
def test_large_images_are_those_of_one_tile(
    mode: str, turn: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large images, decoded by tiles through a temporary file, equal those decoded in one tile."""
    chance = np.random.default_rng(0)
    if mode in ("I;16", "F"):
        data = chance.random((70, 100)) * (65535 if mode == "I;16" else 1)
        image = Image.fromarray(data.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(chance.integers(0, 255, (70, 100, 4), np.uint8)).convert(mode)
    kind = "TIFF" if mode in ("F", "CMYK") else "PNG"
    file = saved(image, kind, icc_profile=P3)
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


def test_the_limit_is_read_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large images are refused by their header, without a warning; Pillow's own limit is ignored and kept."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    data = bytearray(png(1, 0, [b"\0"], 8).getvalue())
    data[16:24] = struct.pack(">II", 20000, 12501)  # 250.02 megapixels
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "huge.png").write_bytes(data)
    with warnings.catch_warnings(), memory(most=20e6):
        warnings.simplefilter("error")
        for read in (upright, lambda x: load(x, (8, 8))):
            with pytest.raises(OSError, match="too large: more than 250 megapixels"):
                read(tmp_path / "huge.png")
        with pytest.raises(OSError, match=r"too large: more than 0\.001 megapixels"):
            upright(saved(SIGN, "PNG"), max_megapixels=0.001)
        for options in ({"max_megapixels": 0.002}, {}):
            assert upright(saved(SIGN, "PNG"), **options).size == SIGN.size
    assert Image.MAX_IMAGE_PIXELS == 500
    with pytest.raises(ValueError, match="max_megapixels: expected a number above 0, got nan"):
        upright(saved(SIGN, "PNG"), max_megapixels=float("nan"))


def test_threads_leave_the_limit_as_it_was() -> None:
    before, file = Image.MAX_IMAGE_PIXELS, saved(SIGN, "PNG").getvalue()
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: upright(io.BytesIO(file)), range(80)))) == 80
    assert before == Image.MAX_IMAGE_PIXELS


def test_decoders_that_need_more_are_held_to_the_same_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoders of all formats are limited to a total of 5 bytes for each of ``max_megapixels``."""
    monkeypatch.setattr(images, "_SPARE", 0)
    megapixels = SIGN.size[0] * SIGN.size[1] / 1e6
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
        allowed = max(megapixels, megapixels * needed / 5)
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
    """Decoding takes 5 bytes a pixel beyond the file and a constant, which is made small here."""
    monkeypatch.setattr(images, "_SPARE", 2_000_000)
    monkeypatch.setattr(images, "_TILE", 256)
    small = np.random.default_rng(0).integers(0, 255, (BIG[1] // 50, BIG[0] // 50, 3), np.uint8)
    image, name, options = LARGE[kind](Image.fromarray(small).resize(BIG))
    path = tmp_path / "x"
    image.save(path, name, **options)
    del image
    upright(saved(SIGN, "PNG"))
    for read in (upright, lambda x: load(x, (64, 64))):
        with memory(most=5 * BIG[0] * BIG[1] + path.stat().st_size + 10e6):
            read(path)


def seeds() -> dict[str, bytes]:
    """Format -> small image file of every format that Pillow writes, with metadata that can be damaged."""
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
    others = set(Image.SAVE) & set(images.formats()) - {name.split()[0] for name in extra}
    for name, image in itertools.product(
        sorted(others), (rgb.convert("F"), rgb.convert("1"), rgb.convert("L"), noise, rgb)
    ):
        with suppress(OSError, ValueError, KeyError, RuntimeError):
            file = saved(image, name)
            upright(file)
            made[name] = file.getvalue()
    return made


def test_mutated_images(tmp_path: Path) -> None:
    """Mutated images raise only OSError, and take the memory of a valid image with that header."""
    chance, files = random.Random(0), seeds()
    assert len(files) >= 25, sorted(files)
    for number, name in zip(range(EXAMPLES), itertools.cycle(files), strict=False):
        data = mutated(files[name], chance)
        path = tmp_path / "x"
        path.write_bytes(data)
        pixels, each = 0, 5.0
        # ``upright`` is tested below with the files that Pillow does not open.
        with warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")
            with Image.open(path, formats=images.formats()) as image:
                pixels = image.size[0] * image.size[1]
                each = max(each, images._decoder_bytes(image))
        found: Any = None
        with memory(most=50e6 if pixels > 250e6 else each * pixels + 100e6), suppress(OSError):
            found = upright(io.BytesIO(data)) if number % 2 else load(path, (16, 16))
        assert found is None or pixels <= 250e6, (number, name)
        if isinstance(found, torch.Tensor):
            assert found.shape == (3, 16, 16) and bool(torch.isfinite(found).all())
        elif found is not None:
            assert found.mode == "RGB"
