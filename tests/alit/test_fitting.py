"""Fitting images of any shape to a model, and restoring their size."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from alit.fitting import FITS, fitted, most_tokens, restored, without_padding
from alit.images import to_tensor
from tests.helpers.hostile import memory

SHAPES = [(256, 256), (400, 300), (300, 400), (1600, 900), (100, 37), (3, 2), (1, 1), (640, 64)]


def noise(width: int, height: int) -> Image.Image:
    channels = [Image.effect_noise((width, height), 60) for _ in range(3)]
    return Image.merge("RGB", channels)


@pytest.mark.parametrize("patch", [8, 16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_keeps_the_shape_within_half_a_patch(shape: tuple[int, int], patch: int) -> None:
    width, height = shape
    found = fitted(noise(*shape), (256, 256), patch, "whole")
    scale = math.sqrt(256**2 / (width * height))
    sides = found.image.shape[1:]
    for side, exact in zip(sides, (height * scale, width * scale), strict=True):
        assert side % patch == 0 and abs(side - exact) <= patch / 2 + 1e-6
    assert found.original == (height, width) and found.padding == (0, 0)
    assert restored(found.image, found.padding, found.original).size == shape


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_enlarges_nothing(shape: tuple[int, int]) -> None:
    """A small enough image is kept and padded with its repeated edge, and restored exactly."""
    width, height = shape
    image = noise(*shape)
    found = fitted(image, (256, 256), 16, "pad")
    inside = without_padding(found.image, found.padding)
    assert all(side % 16 == 0 for side in found.image.shape[1:])
    assert all(0 <= added < 16 for added in found.padding)
    if width * height <= 256**2:
        assert torch.equal(inside, to_tensor(image))
        back = restored(found.image, found.padding, found.original)
        assert back.tobytes() == image.tobytes()
    else:
        assert inside[0].numel() == pytest.approx(256**2, rel=0.01)
    rows, columns = inside.shape[1:]
    assert torch.equal(
        found.image[:, :rows, columns:], inside[:, :, -1:].expand(-1, -1, found.padding[1])
    )
    below = found.image[:, rows:]
    assert torch.equal(below, found.image[:, rows - 1 : rows].expand_as(below))


def test_crop_says_how_large_the_part_was() -> None:
    found = fitted(noise(400, 300), (16, 24), 4, "crop")
    assert found.image.shape == (3, 16, 24) and found.original == (267, 400)
    assert fitted(noise(100, 300), (256, 256), 16, "crop").original == (100, 100)


@pytest.mark.parametrize("shape", [(8_000_000, 1), (1, 8_000_000), (4000, 3)])
@pytest.mark.parametrize("fit", FITS)
def test_long_images_take_no_memory(shape: tuple[int, int], fit: str) -> None:
    """Very long images take little memory and time, and no more tokens than :func:`most_tokens`."""
    image = Image.new("RGB", shape, (10, 20, 200))
    with memory(most=60e6, seconds=2):
        found = fitted(image, (256, 256), 32, fit)
    rows, columns = (side // 32 for side in found.image.shape[1:])
    assert rows * columns <= most_tokens(64)
    blue = (found.image - torch.tensor([10, 20, 200])[:, None, None] / 255).abs().max()
    assert blue < 1e-6


def test_most_tokens_is_a_bound() -> None:
    for width in (1, 7, 31, 33, 100, 500, 3000):
        for height in (1, 9, 32, 65, 300, 2000):
            for fit in FITS:
                sides = fitted(Image.new("RGB", (width, height)), (96, 64), 16, fit).image.shape
                assert sides[1] * sides[2] // 256 <= most_tokens(24)
