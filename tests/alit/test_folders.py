"""Images found in folders, reasons for the other files, and names that no terminal can print."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest
from PIL import Image
from rich.text import Text
from typer.testing import CliRunner

from alit import images
from alit.cli import app
from alit.commands.reconstruct import targets_of
from alit.console import printable
from alit.folders import find, in_folder
from alit.images import load, to_image
from alit.training.image_data import ImageFolder
from tests.helpers.commands import run
from tests.helpers.models import images as tensors
from tests.helpers.models import model

#: Suffixes of image formats that Pillow does not read, and the format that the reason has to name.
UNREAD = {
    **{"heic": "pillow-heif", "HEIF": "pillow-heif", "CR2": "raw", "nef": "raw", "dng": "raw", "jxl": "format"},
    **{"svg": "drawing", "eps": "drawing", "ai": "drawing", "xcf": "document", "psb": "document", "exr": "format"},
}  # fmt: skip
NO_IMAGES = (
    "notes.txt",
    "film.mp4",
    "film.mpg",
    "IMG.xmp",
    "x.json",
    "Thumbs.db",
    "desktop.ini",
    "README",
    "x.pdf",
)
#: A newline, an escape sequence, a mark of direction, undecodable bytes, markup.
NAMES = ("two\nlines", "red\x1b[31m", "\u202egpj", "byte\udcff", "[bold]m:cat:", "写真")


@pytest.fixture
def folder(here: Path) -> Path:
    """Folder ``photos`` with three images, some in subfolders."""
    for name, image in zip(("b.PNG", "2024/a.Jpeg", "2024/May/A.gif"), tensors(), strict=True):
        path = here / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        to_image(image).save(path)
    return here / "photos"


def names(*paths: Path, recursive: bool = True) -> list[str]:
    return [path.name for path in find(paths, recursive=recursive).images]


def test_folders_within(folder: Path) -> None:
    assert names(folder) == ["A.gif", "a.Jpeg", "b.PNG"]
    assert names(folder, recursive=False) == ["b.PNG"]
    assert names(folder / "b.PNG", folder / "2024") == ["b.PNG", "A.gif", "a.Jpeg"]
    (folder / "b.PNG").unlink()
    with pytest.raises(FileNotFoundError, match="no image found, folders within left alone"):
        find([folder], recursive=False)


def test_links(folder: Path, tmp_path: Path) -> None:
    """Each folder is searched once, through whatever links; links to images count, broken links are named."""
    (folder / "2024" / "up").symlink_to("..")
    (folder / "self").symlink_to(folder)
    (folder / "self.png").symlink_to("self.png")
    (folder / "dead.jpg").symlink_to("nothing")
    (folder / "link.png").symlink_to("b.PNG")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "c.png")
    (folder / "other").symlink_to(tmp_path / "other")
    found = find([folder])
    assert [x.name for x in found.images] == ["A.gif", "a.Jpeg", "b.PNG", "link.png", "c.png"]
    assert [x.split(":")[0][-8:] for x in found.left_out] == ["dead.jpg", "self.png"]


def test_hidden_files_are_not_there(folder: Path) -> None:
    for name in ("._b.PNG", ".DS_Store", ".thumbnails/b.png", "2024/.hidden.jpg", "._x.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    found = find([folder])
    assert len(found.images) == 3 and not found.left_out and not found.others
    Image.new("RGB", (8, 8)).save(folder / ".thumbnails" / "b.png")
    assert names(folder / ".thumbnails") == ["b.png"], "given by name"


def test_what_is_no_image_is_counted(folder: Path) -> None:
    for name in NO_IMAGES:
        (folder / name).write_bytes(b"\0\0\1\xb3")
    done = run("encode", folder, "-o", "x.alit", "--tokens", 3)
    assert done.exit_code == 0 and "3 images" in done.output, done.output
    assert f"{len(NO_IMAGES)} other files are no images" in done.output
    for name in NO_IMAGES[1:]:
        (folder / name).unlink()
    assert (
        "1 other file is no image\n" in run("encode", folder, "-o", "x.alit", "--tokens", 3).output
    )


@pytest.mark.parametrize("command", ("encode", "reconstruct", "evaluate"))
def test_what_cannot_be_read_is_named(command: str, folder: Path) -> None:
    for number, suffix in enumerate(UNREAD):
        (folder / f"{number}.{suffix}").write_bytes(b"x")
    (folder / "broken.png").write_bytes(b"x")
    options = {
        "encode": ("encode", folder, "-o", "x.alit", "--tokens", 3),
        "reconstruct": ("reconstruct", folder, "-o", "out", "--tokens", 3),
        "evaluate": ("evaluate", "nano", "--data", folder),
    }
    if command == "evaluate":
        model(image_size=(16, 16)).save_pretrained("weights/nano.safetensors")
    done = run(*options[command])
    assert done.exit_code == 1, done.output
    count = len(UNREAD) + 1
    assert f"{count} of {count + 3} files skipped:" in done.output
    for number, (suffix, reason) in enumerate(UNREAD.items()):
        lines = [x for x in done.output.splitlines() if f"{number}.{suffix}:" in x]
        assert len(lines) == 1 and reason in lines[0], done.output


def test_every_reason_is_one_where_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.heic").write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError, match=r"no image found; 1 of 1 files skipped:\n  .*pillow-heif"
    ):
        find([tmp_path / "in"])
    with pytest.raises(FileNotFoundError, match=r"no image found; 1 of 1 files skipped"):
        in_folder(tmp_path / "in")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        in_folder(folder / "b.PNG")


@pytest.mark.parametrize("name", ("x.HEIC", "x.jpg", "x"))
def test_heic_is_recognized(name: str, folder: Path) -> None:
    """HEIC is recognized by name and by content; a file given by name is always tried."""
    Path(name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    done = run("encode", name, folder / "b.PNG", "-o", "x.alit", "--tokens", 3)
    assert done.exit_code == 1 and "1 image," in done.output
    assert f"{name}: not a readable image (HEIC, which pillow-heif reads" in done.output
    (folder / "b.PNG").rename(name)
    assert run("encode", name, "-o", "y.alit", "--tokens", 3).exit_code == 0


def test_pillow_heif_is_used_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pillow_heif, imitated by an opener for another suffix, is used if installed."""

    def register_heif_opener() -> None:
        monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")

    stand_in = types.ModuleType("pillow_heif")
    stand_in.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    images.formats.cache_clear()
    try:
        to_image(tensors()[0]).save(folder / "x.heic", format="PNG")
        assert "x.heic" in names(folder)
    finally:
        images.formats.cache_clear()


def test_max_megapixels(folder: Path) -> None:
    Image.new("RGB", (1000, 700)).save(folder / "large.png")
    for options in (("encode", folder, "-o", "x.alit"), ("reconstruct", folder, "-o", "out")):
        done = run(*options, "--tokens", 3, "--max-megapixels", 0.5)
        assert done.exit_code == 1 and "large.png: not a readable image (too large" in done.output
        assert run(*options, "--tokens", 3).exit_code == 0
    images = ImageFolder(folder, (16, 16), crop=1.0, flip=False, max_megapixels=0.5)
    with pytest.raises(OSError, match="too large"):
        images.load(len(images) - 1, None)  # type: ignore[arg-type]
    assert load(folder / "large.png", (16, 16)).shape == (3, 16, 16)


# Names.


def test_target_names() -> None:
    """Images of equal names get numbers, in order; names that some file systems treat as equal count as equal."""
    paths = [
        Path(x)
        for x in ("a/x.jpg", "b/x.jpg", "b/X.png", "c/x-2.jpg", "c/é.jpg", "c/e\u0301.jpg", "x.gif")
    ]
    targets = targets_of(paths, Path("out"))
    assert [x.name for x in targets.values()] == [
        *("x.png", "x-2.png", "X-3.png", "x-2-2.png", "é.png", "e\u0301-2.png", "x-4.png"),
    ]
    start = time.process_time()
    for name in ("{}", "p"):
        paths = [Path(f"/x/{i}/{name.format(i)}.jpg") for i in range(10_000)]
        assert len(set(targets_of(paths, Path("/out")).values())) == 10_000
    assert time.process_time() - start < 2


def test_target_is_a_photograph_by_another_name(folder: Path) -> None:
    (folder.parent / "out").symlink_to(folder)
    done = run(
        "reconstruct", folder / "2024" / "a.Jpeg", folder / "b.PNG", "-o", "out", "--tokens", 3
    )
    assert done.exit_code == 0  # a.png and b.png are other files where case counts
    done = run("reconstruct", folder / "a.png", "-o", "out", "--tokens", 3)
    assert done.exit_code == 1 and "is one of the photographs" in done.output


@pytest.mark.parametrize("name", NAMES)
def test_printable(name: str) -> None:
    shown = printable(name)
    assert all(x.isprintable() for x in shown) and Text(shown).plain == shown
    assert shown == name or "\\" in shown


@pytest.mark.parametrize("encoding", ("cp1252", "ascii", "utf-8"))
def test_names_that_cannot_be_printed(encoding: str, folder: Path) -> None:
    """Unprintable names change neither status nor output files of a command, and each file has one line."""
    for name in NAMES:
        (folder.parent / f"{name}.jpg").write_bytes((folder / "2024" / "a.Jpeg").read_bytes())
        (folder.parent / f"{name} 2.heic").write_bytes(b"x")
        (folder.parent / f"{name} 3.jpg").write_bytes(b"x")
    odd, runner = NAMES[1], CliRunner(charset=encoding)
    for arguments, expected in (
        (
            ("reconstruct", ".", "-o", "out" + odd, "--tokens", "3"),
            ["out" + odd, *(f"{name}{end}" for name in NAMES for end in (".png", " 2.heic"))],
        ),
        (("info", f"{odd}.jpg"), []),
        (("convert", f"{odd}.jpg", "x.safetensors"), [odd]),
        (("decode", f"no{odd}.alit", "-o", "out"), []),
        (("encode", f"no{odd}", "-o", "x.alit"), ["no" + odd]),
        (("evaluate", "nano", "--data", f"no{odd}"), ["no" + odd]),
        (("train", "--data", f"no{odd}", "--output", "run", "--base", "dct"), ["no" + odd]),
    ):
        done = runner.invoke(app, list(arguments))
        assert done.exit_code == 1, done.output
        assert "Traceback" not in done.output
        assert not any(x in done.output for x in "\x1b\u202e\udcff"), done.output
        for name in expected:
            escaped = printable(name).encode(encoding, "backslashreplace").decode(encoding)
            assert escaped in done.output, done.output
    assert len(list(Path("out" + odd).iterdir())) == 3 + len(NAMES)
