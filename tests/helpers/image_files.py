"""Image files made by hand: PNG and EXIF byte by byte, color profiles, an image whose rotations all differ."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms

from alit.images import upright

#: White above black with a red square in the upper left corner: all its rotations and reflections differ.
SIGN = Image.new("RGB", (48, 32), "black")
SIGN.paste("white", (0, 0, 48, 16))
SIGN.paste("red", (0, 0, 16, 16))


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def pixel(file: io.BytesIO | Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    """Pixel of an image file as our reader decodes it."""
    return upright(file).getpixel(at)


def png(
    depth: int, color: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes]
) -> io.BytesIO:
    """PNG file of these packed rows, with ``chunks`` before the image data."""
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


def exif(
    *entries: tuple[int, int, int, bytes], count: int | None = None, order: str = "<"
) -> bytes:
    """EXIF block with these entries of tag, type, count and four bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    listed = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    number = struct.pack(order + "H", len(entries) if count is None else count)
    return b"Exif\0\0" + head + number + listed + b"\0" * 4


def orientation(value: int, kind: int = 3, order: str = "<") -> tuple[int, int, int, bytes]:
    number = {1: "Bxxx", 3: "Hxx", 4: "I"}[kind]
    return 0x112, kind, 1, struct.pack(order + number, value)


def profile(*primaries: tuple[float, float, float], curve: bytes | None = None) -> bytes:
    """ICC profile of sRGB with other primaries (XYZ, D50) or another tone curve."""
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
