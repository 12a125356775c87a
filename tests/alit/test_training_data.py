"""Order, crops and damaged files of training images; shards: test_shards.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alit.evaluation.inputs import cropped
from alit.folders import find
from alit.images import load_square
from alit.training import TrainingConfig, train
from alit.training.image_data import (
    ImageFolder,
    ImageTensor,
    Preparation,
    Share,
    Shuffled,
    check_enough,
    shuffled_batches,
)
from tests.helpers.models import model

pytestmark = pytest.mark.usefixtures("one_thread")


def gray(level: int, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_images_are_those_of_every_command(tmp_path: Path) -> None:
    """Training reads images of every mode as other commands do; formats that Pillow can only write are left out."""
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    ramp = np.linspace(0, 65535, 400).reshape(20, 20)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16 bits.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    images = ImageFolder(tmp_path, (16, 16), crop=1.0, flip=False)
    assert (
        [file.suffix for file in images.files]
        == [".png", ".png"]
        == [x.suffix for x in find([tmp_path]).images]
    )
    for index, file in enumerate(images.files):
        loaded, expected = images.load(index, np.random.default_rng(0)), load_square(file, 16)
        assert torch.equal(loaded.float() / 255, expected)
        assert torch.equal(cropped(file, 20), load_square(file, 20))


def levels(images: Tensor) -> list[int]:
    return [int(x.flatten()[0]) for x in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in range(8):
        gray(level).save(tmp_path / f"{level}.png")
    return tmp_path


def test_every_epoch_goes_through_all_images(folder: Path) -> None:
    data = Shuffled(ImageFolder(folder, (16, 16), crop=0.8, flip=True), seed=0)
    seen = [levels(data[p][0][None])[0] for p in range(24)]
    epochs = [seen[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_workers_processes_and_parts_change_no_batch(folder: Path) -> None:
    images = ImageFolder(folder, (16, 16), crop=0.8, flip=True)

    def steps(workers: int, accumulate: int, processes: int, first: int) -> list[Tensor]:
        streams = [
            shuffled_batches(
                images,
                Share(4, accumulate, rank, processes),
                seed=3,
                workers=workers,
                steps=(first, 5),
                pin=False,
            )
            for rank in range(processes)
        ]
        parts = [x.images for batches in zip(*streams, strict=True) for x in batches]
        return list(torch.cat(parts).split(4))

    expected = steps(0, 1, 1, 0)
    assert len(expected) == 5
    for workers, accumulate, processes in ((2, 1, 1), (0, 2, 1), (0, 2, 2), (1, 1, 4)):
        got = steps(workers, accumulate, processes, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    late = steps(0, 1, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(late, expected[3:], strict=True))


def test_crops() -> None:
    """Crops have widths within the bounds of area and aspect, and half of them are flipped."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    random, flips, spans = np.random.default_rng(0), 0, []
    for _ in range(300):
        row = Preparation((16, 16), 0.8, True).augmented(ramp, random)[0, 0].float()
        flips += int(row[0] > row[-1])
        spans.append(abs(float(row[-1] - row[0])) / 15 * 16 / 200)
    assert 110 < flips < 190
    # Width / side = sqrt(area * aspect), area in [0.8, 1], aspect in [3/4, 4/3], and at most 1.
    assert 0.75 < min(spans) < 0.82 and 0.97 < max(spans) <= 1.03
    center = Preparation((16, 8), 1.0, False)
    still = center.augmented(ramp, random)
    assert still.shape == (3, 16, 8) and still.dtype == torch.uint8
    assert torch.equal(still, center.augmented(ramp, random))
    # An image twice as high as wide: crops have the same aspect times the drawn one.
    tall = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 100, 3)))
    for _ in range(100):
        column = Preparation((16, 8), 0.8, False).augmented(tall, random)[0, :, 0].float()
        assert 0.75 < float(column[-1] - column[0]) / 15 * 16 / 200 <= 1.03
    panorama = Preparation((16, 16), 0.8, True).augmented(gray(7, (500, 20)), random)
    assert panorama.shape == (3, 16, 16) and int(panorama[0, 0, 0]) == 7


@pytest.mark.parametrize(
    "error", [TypeError("a float"), AttributeError("x"), KeyError("y"), OverflowError("z")]
)
def test_whatever_a_decoder_raises_is_a_damaged_image(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Image.open

    def broken(source: Any, **options: Any) -> Image.Image:
        if str(source).endswith("3.png"):
            raise error
        return opened(source, **options)

    monkeypatch.setattr(Image, "open", broken)
    data = Shuffled(ImageFolder(folder, (16, 16), crop=1.0, flip=False), seed=0)
    found = [data[p] for p in range(8)]
    ((line,),) = (lines for _, lines in found if lines)
    assert line.startswith(f"{folder / '3.png'}: damaged")
    with pytest.raises(OSError, match="damaged, or too large"):
        load_square(folder / "3.png", 16)


def damage(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3.png").write_bytes(b"")


def test_images_that_come_once() -> None:
    """The first ``once`` images of the first epoch are not seen again in later epochs."""
    images = ImageTensor(torch.arange(10.0).expand(3, 2, 2, 10).permute(3, 0, 1, 2), flip=False)
    data = Shuffled(images, seed=0, once=3)
    seen = [int(data[position][0][0, 0, 0]) for position in range(10 + 7 + 7 + 3)]
    held, rest = seen[:3], seen[3:10]
    assert sorted(held + rest) == list(range(10))
    assert sorted(seen[10:17]) == sorted(seen[17:24]) == sorted(rest)
    assert seen[10:17] != seen[17:24] and not {*seen[10:]} & {*held}
    plain = Shuffled(images, seed=0)
    assert [int(plain[position][0][0, 0, 0]) for position in range(10)] == seen[:10]
    assert int(data[20][0][0, 0, 0]) == seen[20], "in any order"
    with pytest.raises(ValueError, match="data: expected more images than the 10 that are held"):
        check_enough(images, 2, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_skipped_and_named(folder: Path, workers: int) -> None:
    damage(folder)
    images = ImageFolder(folder, (16, 16), crop=1.0, flip=False)
    options: dict[str, Any] = {"seed": 0, "workers": workers, "pin": False}
    batches = list(shuffled_batches(images, Share(4), steps=(0, 6), **options))
    assert all(x.images.shape == (4, 3, 16, 16) for x in batches)
    seen = Counter(level for x in batches for level in levels(x.images))
    assert seen.keys() == {0, 4, 5, 6, 7}
    names = {Path(line.split(": ")[0]).name for x in batches for line in x.unreadable}
    assert names == {"1.png", "2.png", "3.png"}


def test_a_run_reports_them(folder: Path) -> None:
    damage(folder)
    (folder / "9.heic").write_bytes(b"no image")
    config = TrainingConfig(
        data=str(folder), steps=4, batch_size=4, learning_rate=1e-3, workers=0, device="cpu"
    )
    result = train(config, model=model())
    left_out, *damaged = result.unreadable
    assert "9.heic: HEIC" in left_out
    assert sorted(Path(x.split(": ")[0]).name for x in damaged) == ["1.png", "2.png", "3.png"]
    for file in folder.glob("*.png"):
        file.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"data: no image can be read, 9 tried, "):
        train(config, model=model())


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"crop": 1.0, "flip": False}
    with pytest.raises(OSError, match="not a folder"):
        ImageFolder(tmp_path / "no", (16, 16), **options)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(OSError, match="no image found"):
        ImageFolder(tmp_path, (16, 16), **options)


def test_tensors_are_flipped_half_of_the_time() -> None:
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    images = ImageTensor(ramp, flip=True)
    flips = [bool(images.load(0, np.random.default_rng(i))[0, 0, 0] == 7) for i in range(200)]
    assert 70 < sum(flips) < 130
