"""Fixtures: images to train on, a folder to call commands in, LPIPS with random weights, and a local Hub."""

from __future__ import annotations

import os
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alit import model_file
from alit.losses import Perceptual
from tests.helpers.hub_server import Hub, forget, saved, serving
from tests.helpers.models import model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of seven images of several shapes."""
    path = tmp_path / "images"
    (path / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(7):
        pixels = random.integers(0, 255, (40 + index, 60 - index, 3), dtype=np.uint8)
        place = path / "more" if index % 2 else path
        Image.fromarray(pixels).save(place / f"{index}.png")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory whose folder of shipped weights holds "nano", the weights of a small model."""
    (tmp_path / "weights").mkdir()
    model().save_pretrained(tmp_path / "weights" / "nano.safetensors")
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def random_perceptual(monkeypatch: pytest.MonkeyPatch) -> list[Perceptual]:
    """List of the LPIPS modules made by the test, which get small random weights instead of downloaded ones."""
    made: list[Perceptual] = []

    def load(self: Perceptual) -> Perceptual:
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            low = 0 if p.ndim == 4 and p.shape[0] == 1 else -0.05
            p.data.uniform_(low, 0.05, generator=generator)
        made.append(self)
        return self

    monkeypatch.setattr(Perceptual, "load_pretrained", load)
    return made


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every download of weights fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Empty local hub, which ``huggingface_hub`` uses as the Hub, with an empty cache and no waits before retries."""
    with serving() as server:
        for name in [x for x in os.environ if x.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # XET is another transfer protocol, which the local hub does not implement.
        for name in ("TELEMETRY", "PROGRESS_BARS", "XET"):
            monkeypatch.setenv(f"HF_HUB_DISABLE_{name}", "1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        forget()
        yield server
        forget()


@pytest.fixture(scope="session")
def content() -> bytes:
    """Content of the small model's file."""
    return saved(model())
