"""Pictures to train on, and a folder to call commands in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alit import model_file
from tests.helpers.models import model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of several shapes."""
    path = tmp_path / "pictures"
    (path / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(7):
        pixels = random.integers(0, 255, (40 + index, 60 - index, 3), dtype=np.uint8)
        place = path / "more" if index % 2 else path
        Image.fromarray(pixels).save(place / f"{index}.png")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; the shipped weights, "nano", are in it, those of a small model."""
    (tmp_path / "weights").mkdir()
    model().save_pretrained(tmp_path / "weights" / "nano.safetensors")
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path
