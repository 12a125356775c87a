"""The studies of generators: the judge of shapes, and padded against packed sampling."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.studies import generation_packed as study
from tests.helpers.shapes import KINDS, SIDE, judged, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_judge_knows_shapes() -> None:
    images, kinds = shapes(60)
    assert set(kinds) == set(range(len(KINDS)))
    assert [judged(image) for image in images] == kinds
    noisy = images + 0.005 * torch.randn(images.shape)
    assert [judged(image) for image in noisy] == kinds


def test_the_judge_refuses_what_is_none() -> None:
    images, _ = shapes(40, seed=1)
    assert not any(judged(x) is not None for x in torch.rand(20, 3, SIDE, SIDE))
    assert judged(images[0, :, :1, :1].expand(-1, SIDE, SIDE)) is None, "a plain background"
    bands = [x.roll(12 * (number % 2), 3) for number, x in enumerate(images.split(8, 2))]
    for wrong in (
        (images + images.flip(0)) / 2,
        images[:, [1, 2, 0]],  # other colors
        torch.cat(bands, 2),
        torch.where(torch.arange(SIDE) // 8 % 2 == 0, images, images.flip(0)),
    ):
        found = sum(judged(image) is not None for image in wrong)
        assert found <= 4, f"{found} of 40"  # a few pairs are nearly the same image


@torch.no_grad()
def test_padded_batches_draw_what_packed_ones_do() -> None:
    config = replace(study.CONFIG, codebook_size=16, width=32, layers=1, heads=2)
    with mock.patch.object(study, "COUNT", 6), mock.patch.object(study, "BATCH", 4):
        generator = study.Ending(config).eval()
        one, other = study.packed(generator), study.padded(generator)
    assert [len(x) for x in one] == [len(x) for x in other] and len(one) == 6
    assert {len(x) for x in one} <= set(study.LENGTHS) and len({len(x) for x in one}) > 1
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
