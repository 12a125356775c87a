"""The linear probe: its classifier, labeled folders, accuracies on true and shuffled labels, and the command."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alit.evaluation import Probe, labeled, probe, thumbnail
from alit.evaluation.labeled import split
from alit.evaluation.logistic import STRENGTHS, Parts, accuracy, fit
from alit.evaluation.metrics import thumbnail_pixels
from alit.evaluation.probe import Described
from alit.images import load
from tests.helpers.commands import refused, run, text
from tests.helpers.models import model

pytestmark = pytest.mark.usefixtures("one_thread")
#: Images of each class.
EACH = 8
COLORS = {"blue": (60, 90, 200), "green": (70, 180, 60), "red": (200, 80, 70)}


def color(name: str, random: np.random.Generator) -> np.ndarray:
    """Noisy image of about this color, (16, 24, 3) uint8."""
    shade = np.array(COLORS[name]) + random.uniform(-40, 40, 3)
    return (shade + random.normal(0, 25, (16, 24, 3))).clip(0, 255).astype(np.uint8)


def stripes(name: str, random: np.random.Generator) -> np.ndarray:
    """Noisy gray gradient from left to right ("across") or from top to bottom, (16, 24, 3) uint8."""
    ramp = (
        np.linspace(40, 200, 24)[None, :] if name == "across" else np.linspace(40, 200, 16)[:, None]
    )
    gray = np.broadcast_to(ramp, (16, 24)) + random.uniform(-30, 30)
    pixels = np.repeat(gray[..., None], 3, 2) + random.normal(0, 10, (16, 24, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def draw(
    path: Path,
    names: list[str],
    image: Callable[[str, np.random.Generator], np.ndarray] = color,
    each: int = EACH,
    seed: int = 0,
    shuffled: bool = False,
) -> Path:
    """Write a folder of images for each name; ``shuffled``: images are independent of the name."""
    random = np.random.default_rng(seed)
    labels = np.repeat(names, each)
    shown = random.permutation(labels) if shuffled else labels
    for number, (label, name) in enumerate(zip(labels, shown, strict=True)):
        (path / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(str(name), random)).save(path / label / f"{number:03}.png")
    return path


@pytest.fixture
def folder(here: Path) -> Path:
    return draw(here / "data", list(COLORS))


def probed(path: Path, test: Path | None = None, **options: Any) -> Probe:
    m = model(any_length=True)
    return probe(m, labeled(path), None if test is None else labeled(test), **options)


def blobs(count: int, features: int, apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (count, features) of three classes, means ``apart`` in one direction each, unequal scales; labels."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(count) % 3
    x_NF = torch.randn(count, features, generator=generator)
    x_NF[:, :3] += apart * torch.nn.functional.one_hot(label_N, 3)
    return x_NF * torch.logspace(-1.5, 1.5, features) + 5, label_N


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_minimum(l2: float) -> None:
    """The fit is the minimum of the convex objective: its gradient vanishes, in float64 on standardized features."""
    x_NF, label_N = blobs(60, 7, apart=2)
    *_, found = fit(x_NF, label_N, 3, [1.0, l2])
    x_NF = x_NF.double()
    normal = (x_NF - x_NF.mean(0)) / x_NF.std(0, correction=0)
    weights = found.weight_KF.double().requires_grad_(), found.bias_K.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(normal @ weights[0].T + weights[1], label_N)
    loss = loss + l2 / 2 * weights[0].square().sum()
    for grad in torch.autograd.grad(loss, weights):
        assert grad.abs().max() < 1e-4
    scores = normal @ weights[0].T + weights[1]
    torch.testing.assert_close(found.scores(x_NF.float()).double(), scores, atol=1e-4, rtol=1e-4)


def test_a_constant_feature_changes_nothing() -> None:
    """A constant feature with rounding noise changes no score; a constant alone gives equal scores."""
    x_NF, label_N = blobs(40, 4, apart=2)
    constant = torch.full((40, 1), 0.1) * (1 + 1e-6 * torch.rand(40, 1))
    beside = torch.cat([x_NF, constant], 1)
    (expected,), (found,) = (fit(x, label_N, 3, [0.1]) for x in (x_NF, beside))
    torch.testing.assert_close(found.scores(beside), expected.scores(x_NF), atol=1e-3, rtol=1e-3)
    (alone,) = fit(torch.ones(40, 1), label_N, 3, [0.1])
    assert bool(alone.scores(torch.ones(1, 1)).isfinite().all())


def parts(label_N: Tensor) -> Parts:
    third = len(label_N) // 3
    fitting, validation, test = torch.arange(3 * third).split(third)
    return Parts(label_N[: 3 * third], fitting, validation, test)


def test_the_penalty_is_chosen_by_the_validation_part() -> None:
    """The validation part chooses a strong penalty for noise features and a weak one for well-separated classes."""
    generator = torch.Generator().manual_seed(0)
    noise = accuracy(torch.randn(90, 200), parts(torch.arange(90) % 3), generator)
    x_NF, label_N = blobs(90, 3, apart=30)
    plain = accuracy(x_NF, parts(label_N), generator)
    assert noise.l2 >= 1 and plain.l2 == STRENGTHS[-1] and plain.top1 == 1
    assert noise.top1 < 0.6


def test_only_the_test_part_counts() -> None:
    """Other labels in the test part change the accuracy but not the chosen penalty."""
    x_NF, label_N = blobs(90, 5, apart=8)
    good = accuracy(x_NF, parts(label_N), torch.Generator().manual_seed(0))
    wrong = label_N.clone()
    wrong[60:] = (wrong[60:] + 1) % 3
    bad = accuracy(x_NF, parts(wrong), torch.Generator().manual_seed(0))
    assert (good.top1, bad.top1, good.l2) == (1, 0, bad.l2)
    assert (good.low, good.high, bad.low, bad.high) == (1, 1, 0, 0)


def test_the_interval_is_that_of_drawing_images_again() -> None:
    x_NF, label_N = blobs(120, 5, apart=1.5)
    found = accuracy(x_NF, parts(label_N), torch.Generator().manual_seed(0))
    assert 0.4 < found.top1 < 0.95
    hits = np.arange(40) < round(40 * found.top1)
    drawn = np.random.default_rng(0).choice(hits, (20000, 40)).mean(1)
    assert np.allclose((found.low, found.high), np.quantile(drawn, (0.025, 0.975)), atol=0.026)


def test_parts_have_their_share_of_each_class() -> None:
    label_N = torch.tensor([0] * 40 + [1] * 9 + [2] * 2)[torch.randperm(51)]
    rest, taken = split(label_N, 0.25, torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(51))
    assert label_N[taken].bincount().tolist() == [10, 2, 1]
    again, other = (split(label_N, 0.25, torch.Generator().manual_seed(n))[1] for n in (3, 4))
    assert torch.equal(taken, again) and not torch.equal(taken, other)


def test_thumbnails_are_judged_by_what_they_store() -> None:
    x = torch.rand(2, 3, 16, 24)
    small = thumbnail_pixels(x, 12 * 25)
    assert small.shape == (2, 3, 5, 5)
    levels = small * 15
    torch.testing.assert_close(levels, levels.round())
    assert thumbnail_pixels(x, 1e9).shape == x.shape
    flat = torch.full((1, 3, 16, 24), 7 / 15)
    torch.testing.assert_close(
        thumbnail(flat, 48), thumbnail_pixels(flat, 48).mean().expand(1, 3, 16, 24)
    )


def test_what_is_classified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features keep the labels of their images, even after an image that cannot be read."""
    Path("data/blue/000.png").write_bytes(b"no image")
    module = importlib.import_module("alit.evaluation.probe")
    seen: list[tuple[Tensor, Parts]] = []

    def record(x_NF: Tensor, parts: Parts, generator: torch.Generator) -> Any:
        seen.append((x_NF, parts))
        return accuracy(x_NF, parts, generator)

    monkeypatch.setattr(module, "accuracy", record)
    m = model(any_length=True)
    result = probe(m, labeled(folder), lengths=[5, 12], batch_size=5)
    assert len(result.unreadable) == 1 and "000.png" in result.unreadable[0]
    files = sorted(folder.glob("*/*.png"))[1:]
    images = torch.stack([load(file, (16, 24)) for file in files])
    names = sorted(COLORS)
    for row, tokens in enumerate((5, 12)):
        found = m.features(images, tokens=tokens)
        expected = [found.pooled_BD, found.pooled_codes_BC, found.codes_BLC.flatten(1)]
        expected.append(thumbnail_pixels(images, tokens * 5).flatten(1))
        x = [x_NF for x_NF, _ in seen[7 * row : 7 * row + 7]]
        for got, wanted in zip([*x[:3], x[6]], expected, strict=True):
            torch.testing.assert_close(got, wanted.detach(), atol=2e-5, rtol=1e-4)
        assert [got.shape for got in x[3:6]] == [got.shape for got in x[:3]]
        assert not torch.allclose(x[3], x[0], atol=1e-2), "other weights"
    for _, each in seen:
        assert each.label_N.tolist() == [names.index(file.parent.name) for file in files]
        places = torch.cat([each.fitting, each.validation, each.test])
        assert torch.equal(places.sort().values, torch.arange(len(files)))
    assert (result.training, result.test) == (17, 6)


@pytest.mark.parametrize(
    "image, names, kinds",
    [
        (color, list(COLORS), ("latents", "codes", "all_codes", "thumbnail")),
        (stripes, ["across", "down"], ("latents", "thumbnail")),
    ],
)
def test_what_can_be_told_apart_and_what_not(
    tmp_path: Path, image: Any, names: list[str], kinds: tuple[str, ...]
) -> None:
    """Visible classes are recognized from all kinds of features; shuffled labels only at chance level."""
    path = draw(tmp_path / "true", names, image, each=20)
    (row,) = probed(path, lengths=[12]).lengths
    assert all(getattr(row, kind).top1 >= 0.9 for kind in kinds), row
    path = draw(tmp_path / "shuffled", names, image, each=20, shuffled=True)
    result = probed(path, lengths=[12])
    (row,) = result.lengths
    assert result.chance == pytest.approx(1 / len(names))
    for kind in Described._fields:
        found = getattr(row, kind)
        assert found.low <= result.chance <= found.high and found.top1 < 0.8, (kind, found)


def test_a_folder_to_test_on(folder: Path, tmp_path: Path) -> None:
    """With a test folder, all of the data are used for training, and accuracies are of the test folder."""
    other = draw(tmp_path / "other", list(COLORS), each=4, seed=1)
    result = probed(folder, other, lengths=[12])
    assert (result.training, result.test) == (3 * EACH, 12)
    assert result.lengths[0].latents.top1 >= 0.9
    # With the names of two classes exchanged, their images are classified wrongly.
    for old, new in (("red", "x"), ("blue", "red"), ("x", "blue")):
        (other / old).rename(other / new)
    assert probed(folder, other, lengths=[12]).lengths[0].latents.top1 <= 0.4


def test_the_seed_decides(folder: Path) -> None:
    first, again, other = (probed(folder, lengths=[3], seed=n) for n in (0, 0, 1))
    assert first == again and first.lengths != other.lengths
    state = torch.random.get_rng_state()
    probed(folder, lengths=[3], seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is as it was"


@pytest.mark.parametrize(
    "options",
    [{"recurrence": "residual", "codebooks": "each"}, {"bottleneck": "unfactorized"}],
    ids=str,
)
def test_every_kind_of_model(folder: Path, options: dict[str, Any]) -> None:
    result = probe(model(iterations=2, **options), labeled(folder))
    assert [row.tokens for row in result.lengths] == [3, 6], "whole iterations by default"
    assert result.lengths[-1].latents.top1 > 0.6


def test_command(folder: Path) -> None:
    options = ("-o", "out.json", "--plot", "out.png", "--lengths", "6,3", "--seed", 2)
    done = run("probe", "nano", "--data", "data", *options, "--device", "cpu")
    assert done.exit_code == 0, done.output
    for word in ("latents", "thumbnail", "6 test images", "out.json"):
        assert word in done.output
    stored = json.loads(Path("out.json").read_text())
    assert stored["model"] == "nano" and stored["classes"] == sorted(COLORS)
    assert [row["tokens"] for row in stored["lengths"]] == [3, 6] and stored["seed"] == 2
    expected = probe(model(), labeled(folder), lengths=[3, 6], seed=2)
    assert stored["lengths"][1]["codes"]["top1"] == expected.lengths[1].codes.top1
    assert Image.open("out.png").width > 500


def test_images_that_cannot_be_read_are_named(folder: Path) -> None:
    Path("data/red/no.png").write_bytes(b"no image")
    Path("data/beside.png").write_bytes(b"of no class")
    test = draw(Path("test"), list(COLORS), each=2)
    (test / "green/raw.dng").write_bytes(b"")
    done = run("probe", "nano", "--data", "data", "--test", "test", "--lengths", 3, "-o", "x.json")
    refused(done, "2 of 32 files skipped", "data/red/no.png: not a readable", "raw.dng: camera raw")
    assert "beside" not in text(done)
    assert len(json.loads(Path("x.json").read_text())["unreadable"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "nowhere: not a folder"),
        ("--data data/red", "two classes, got 0 folders in data/red"),
        (
            "--data one",
            "data: expected a folder of images for each of at least two classes, got 1",
        ),
        ("--data hollow", "hollow/none: no image found"),
        ("--data few", "data: expected at least 4 readable images of each class, got 3 of 'b'"),
        ("--data cut", "data: expected at least 4 readable images of each class, got 3 of 'b'"),
        ("--data data --test few", "test: expected the classes of data, ['blue', 'green', 'red']"),
        ("--data data --test data/red", "test: expected a folder of images"),
        ("--data data --lengths 3,13", "lengths: expected an integer in [1, 12], got 13"),
        ("--data data --lengths 0", "lengths: expected an integer in [1, 12], got 0"),
        ("--data data --lengths 4", "lengths: expected a multiple of 3, whole iterations"),
        ("--data data --lengths 3,x", "lengths: expected numbers such as 32,64,256, got '3,x'"),
        ("--data data -o data", "data: expected a file or nothing there, found a folder"),
        ("--data data --plot no/x.png", "no: no such folder"),
        ("--data data --device gpu", "got 'gpu'"),
    ],
)
def test_errors_have_no_traceback(folder: Path, arguments: str, message: str) -> None:
    draw(Path("one"), ["red"], each=4)
    draw(Path("few"), ["red"], each=5)
    Path("few/red").rename("few/a")
    draw(Path("few"), ["blue"], each=3)
    Path("few/blue").rename("few/b")
    draw(Path("cut"), ["red", "blue"], each=4)
    Path("cut/red").rename("cut/a")
    Path("cut/blue").rename("cut/b")
    next(Path("cut/b").iterdir()).write_bytes(b"")
    draw(Path("hollow"), ["red"], each=4)
    Path("hollow/none").mkdir()
    refused(run("probe", "nano", *arguments.split()), message)


def test_lengths_are_needed(folder: Path) -> None:
    with pytest.raises(ValueError, match="lengths: expected at least one, got none"):
        probed(folder, lengths=[])
