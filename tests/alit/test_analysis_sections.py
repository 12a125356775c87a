"""alit.analysis: each section finds an effect planted in its inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from alit.analysis import ImageSet, spearman
from alit.analysis import specialization as tokens_and_segments
from alit.analysis.complexity import complexity, gray_entropy, jpeg_sizes
from alit.analysis.familiarity import CHANGES, SECOND, changed, familiarity, phase_scrambled
from alit.analysis.inputs import batches
from alit.analysis.rollouts import errors
from alit.analysis.specialization import best_overlaps, covered, fixed_overlaps, specialization
from alit.analysis.statistics import mean, more
from alit.analysis.task import Watcher
from alit.evaluation import Networks
from tests.helpers.models import model


def image_set(levels: Tensor) -> ImageSet:
    names = [f"{n}.png" for n in range(len(levels))]
    return ImageSet(Path("."), names, levels, names, [])


def of_entropies(bits: list[int]) -> Tensor:
    """Gray images (N, 3, 16, 16), uint8, with these entropies of gray levels and random positions."""
    found = []
    for number, count in enumerate(bits):
        generator = torch.Generator().manual_seed(number)
        gray = (torch.arange(256) % 2**count) * (256 // 2**count)
        found.append(
            gray[torch.randperm(256, generator=generator)].view(1, 16, 16).expand(3, -1, -1)
        )
    return torch.stack(found).to(torch.uint8)


class Planted:
    """Fake model whose error falls below 0.05 at the iteration equal to the entropy of an image."""

    config = model(image_size=(16, 16)).config
    latent_tokens = torch.empty(0)

    def rollout(self, images: Tensor) -> Any:
        bits = torch.tensor(gray_entropy((images * 255).round().to(torch.uint8))).round()
        for iteration in range(1, self.config.iterations + 1):
            off = torch.where(bits <= iteration, 0.01, 0.1)[:, None, None, None]
            yield SimpleNamespace(prediction=images + off)

    def pixels(self, prediction: Tensor) -> Tensor:
        return prediction


def planted() -> Any:
    return Planted()


def test_tokens_of_entropy_have_a_correlation_of_one() -> None:
    bits = [1, 4, 2, 3, 3, 1, 4, 2]
    some, m = image_set(of_entropies(bits)), planted()
    assert gray_entropy(some.levels) == pytest.approx(bits)
    found_NK = errors(m, some.levels, batch_size=3)
    scores = [float(10 * x) for x in bits]
    result = complexity(some, found_NK, m.config.lengths, scores, thresholds=[0.05, 0.2])
    at, easy = result.thresholds
    assert (
        at.entropy.value == pytest.approx(1) and at.scores and at.scores.value == pytest.approx(1)
    )
    assert at.tokens == pytest.approx(3 * sum(bits) / len(bits)) and at.met == 1
    assert at.scores_given_first and at.scores_given_first.value == pytest.approx(1)
    assert easy.tokens == 3 and easy.entropy.value is None  # the same for all
    assert [x.score for x in result.images] == scores
    against = complexity(some, found_NK, m.config.lengths, [-x for x in scores], thresholds=[0.05])
    assert against.thresholds[0].scores and against.thresholds[0].scores.value == pytest.approx(-1)


def test_correlations_are_those_of_scipy() -> None:
    x, y, z = np.random.default_rng(0).integers(9, size=(3, 60)).astype(float)
    y, z = y + x, z + x
    assert spearman(x, y, seed=0).value == pytest.approx(spearmanr(x, y).statistic)
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    partial = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, given=z, seed=0).value == pytest.approx(partial)
    assert spearman(x, y, given=y, seed=0).value is None  # nothing is left
    found = spearman(x, y, seed=0)
    assert found == spearman(x, y, seed=0) != spearman(x, y, seed=1)
    assert found.low and found.high and found.low < xy < found.high < 1


def test_intervals_cover_the_mean() -> None:
    """The interval of a mean with standard error 0.1 is about -0.196 to 0.196."""
    values = np.random.default_rng(0).normal(size=100)
    found = mean((values - values.mean()) / values.std(), seed=0)
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.low == pytest.approx(-0.196, abs=0.03)
    assert found.high == pytest.approx(0.196, abs=0.03)


def test_differences_that_sizes_explain_vanish() -> None:
    sizes = np.random.default_rng(0).uniform(100, 900, size=50)
    values = 0.1 + 0.02 * np.log(sizes)
    harder = 3 * sizes
    raw, matched = more(values, sizes, values + 0.02 * np.log(3), harder, paired=True, seed=0)
    assert raw.value == pytest.approx(0.02 * np.log(3)) and matched.value == pytest.approx(
        0, abs=1e-9
    )
    raw, matched = more(values, sizes, values + 0.5, sizes[::-1], paired=False, seed=0)
    assert raw.value == pytest.approx(0.5) == matched.value
    raw, matched = more(values, np.full(50, 7), values + 0.5, sizes, paired=True, seed=0)
    assert matched.value == pytest.approx(0.5)  # no line through one size


def test_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (2, 3, 16, 24), generator=generator).to(torch.uint8)
    assert torch.equal(changed(levels, "negative", 0), 255 - levels)
    assert torch.equal(changed(levels, "BGR", 0)[:, 0], levels[:, 2])
    assert torch.equal(changed(levels, "mirrored", 0)[0, :, :, 0], levels[0, :, :, -1])
    assert torch.equal(changed(levels, "upside down", 0)[0, :, 0], levels[0, :, -1])
    mixed = changed(levels, "shuffled patches", 5)
    pieces = [
        {
            tuple(x.flatten().tolist())
            for x in y.unfold(1, 2, 2).unfold(2, 3, 3).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }
        for y in (levels[0], mixed[0])
    ]
    assert pieces[0] == pieces[1] and len(pieces[0]) == 64 and not torch.equal(mixed, levels)
    image = levels[0] / 255
    scrambled = phase_scrambled(image, generator)
    for own, other in zip(
        torch.fft.fft2(image).abs(), torch.fft.fft2(scrambled).abs(), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-4)
    assert (scrambled - image).abs().mean() > 0.1
    for name in CHANGES:  # of an image, whatever stands before it
        assert torch.equal(changed(levels, name, 3)[1], changed(levels[1:], name, 4)[0])


def test_a_model_that_sees_entropy_alone_finds_all_changes_familiar() -> None:
    """Changes that keep the entropy are familiar; a second folder of higher entropy is not."""
    some, second = image_set(of_entropies([1, 2, 1, 2, 3])), image_set(of_entropies([4, 4, 4]))
    m = planted()
    found_NK = errors(m, some.levels)
    result = familiarity(m, some, found_NK, m.config.lengths, second, thresholds=[0.05])
    kinds = {x.name: x for x in result.kinds}
    assert list(kinds) == ["as they are", *CHANGES, SECOND]
    for name in ("mirrored", "upside down", "BGR", "shuffled patches"):
        assert kinds[name].l1[1].more.value == pytest.approx(0, abs=1e-6), name
    assert kinds[SECOND].images == 3 and kinds[SECOND].tokens[0].mean == 12
    assert kinds[SECOND].tokens[0].more.value == pytest.approx(12 - 3 * 9 / 5)
    assert kinds[SECOND].jpeg == pytest.approx(np.mean(jpeg_sizes(second.levels)))


class Brightness(torch.nn.Module):
    """Classifier of ten classes: the brightness of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = torch.nn.Parameter(torch.linspace(0, 1, 10))

    def forward(self, images: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3))[:, None] - self.centers).abs()


def test_agreement_is_that_of_the_classes() -> None:
    watch = Watcher(model(image_size=(16, 16)), Networks(classifier=Brightness()))
    images = torch.full((4, 3, 16, 16), 0.34)
    same, near, far = images, images + 2 / 9, images + 0.6
    watch(images, [same, near, far, far])
    watch(images[:1], [same[:1]] * 4)
    found = watch.result(seed=0)
    assert [(x.model.top1.value, x.model.top5.value) for x in found] == [
        *((1, 1), (pytest.approx(0.2), 1)),
        *((pytest.approx(0.2), pytest.approx(0.2)),) * 2,
    ]
    assert all(x.thumbnail.top1.value == 1 for x in found)  # a flat one says how bright it is
    assert [x.tokens for x in found] == [3, 6, 9, 12] and found[1].bits == 30


LABELS = torch.zeros(16, 16, dtype=torch.long)
LABELS[:8, :8], LABELS[8:, 4:] = 1, 2


def test_maps_that_are_segments_overlap_wholly() -> None:
    cover, kept = covered(LABELS, (4, 4))
    assert kept.tolist() == [0, 1, 2] and cover.shape == (3, 16)
    overlap, token, count = best_overlaps(cover.flip(0), cover)
    assert overlap.tolist() == [1, 1, 1] and token.tolist() == [2, 1, 0]
    assert count.tolist() == [int(x) for x in cover.sum(1)]
    assert fixed_overlaps(cover, cover).tolist() == [1, 1, 1]
    assert best_overlaps(torch.rand(5, 16), cover)[0].max() < 1


def test_overlaps_count_pixels() -> None:
    """Overlaps with segments that partly cover grid cells equal those of masks enlarged to pixels."""
    labels = torch.randint(3, (16, 16), generator=torch.Generator().manual_seed(0))
    labels[0, 0] = 3  # too small to count
    cover, kept = covered(labels, (4, 4))
    assert kept.tolist() == [0, 1, 2]
    maps = torch.rand(6, 16, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(6, 16, 3)
    for number, row in enumerate(maps.view(6, 4, 4)):
        large = row.repeat_interleave(4, 0).repeat_interleave(4, 1)
        for at, threshold in enumerate(row.flatten()):
            for label in range(3):
                both = (large >= threshold) & (labels == label)
                either = (large >= threshold) | (labels == label)
                found[number, at, label] = both.sum() / either.sum()
    torch.testing.assert_close(best_overlaps(maps, cover)[0], found.amax((0, 1)))


def test_no_mask_overlaps_more_than_the_most_on_a_grid() -> None:
    """The best overlap of any mask on the grid is that of the cells that the segment covers most."""
    cover = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)).square()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    inter = cover @ masks.T
    overlap = inter / (masks.sum(1) + cover.sum(1, keepdim=True) - inter)
    torch.testing.assert_close(best_overlaps(cover, cover)[0], overlap.amax(1))


def test_a_model_that_looks_at_segments_beats_all_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose attention maps follow the segments of its image beats all controls; the other layer is random."""
    m = model(image_size=(16, 16))
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (4, 3, 16, 16), generator=generator).to(torch.uint8)
    labels = [LABELS.rot90(n) for n in range(4)]
    known = {x.numpy().tobytes(): n for n, x in enumerate(next(batches(levels, 4)))}

    def attention(given: Any, images: Tensor) -> Tensor:
        maps = torch.rand(len(images), 2, 12, 4, 4, generator=generator)
        if given is m:
            for image, row in zip(images, maps, strict=True):
                cover, _ = covered(labels[known[image.numpy().tobytes()]], (4, 4))
                row[1, 3:6] = cover.view(3, 4, 4)
        return maps

    monkeypatch.setattr(tokens_and_segments, "attention_of_layers", attention)
    found, sheet = specialization(m, image_set(levels), labels, batch_size=3)
    assert found.tokens.oracle.value == 1 and found.layer == 2 and found.segments == 12
    assert found.iterations[1] == 1 > max(found.iterations[0], *found.iterations[2:])
    *controls, most = found.controls
    assert len(controls) == 4 and most.oracle.value == 1
    assert all(x.oracle.value and x.oracle.value < 0.95 for x in controls)
    assert len(sheet.rows) == 4 and sheet.rows[0][1].caption.endswith("(it. 2): 1.00")
