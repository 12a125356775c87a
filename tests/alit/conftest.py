"""Pictures to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
