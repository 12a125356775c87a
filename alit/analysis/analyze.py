"""All sections of an analysis whose inputs are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation import Networks
from ..images import MAX_MEGAPIXELS
from ..tokenizer import AdaptiveTokenizer
from . import task
from .complexity import THRESHOLDS, Complexity, complexity
from .complexity import gallery as complexity_gallery
from .familiarity import Familiarity, familiarity
from .familiarity import gallery as familiarity_gallery
from .gallery import Gallery
from .inputs import read_images, read_scores, read_segments
from .rollouts import errors
from .specialization import Specialization, specialization


@dataclass(frozen=True)
class Analysis:
    """Result of :func:`analyze`.

    Attributes:
        images, second: numbers of images that were read; None without a second folder.
        lengths: tokens after each iteration.
        l1: mean L1 pixel error at each length.
        max_l1: the threshold that pages show: the middle one.
        classifier: name of the classifier; None without one.
        task: empty without a classifier. ``specialization``: None without segments.
        left_out: sections that were not measured and what they need; a line each.
        skipped: files that were skipped; a line each.
        galleries: the gallery of each section, by its name; not part of :meth:`numbers`.
    """

    images: int
    second: int | None
    seed: int
    lengths: list[int]
    l1: list[float]
    max_l1: float
    complexity: Complexity
    familiarity: Familiarity
    classifier: str | None
    task: list[task.Length]
    specialization: Specialization | None
    left_out: list[str]
    skipped: list[str]
    galleries: dict[str, Gallery] = field(default_factory=dict, repr=False, compare=False)

    def numbers(self) -> dict[str, Any]:
        """All fields but the galleries, by name, as JSON values."""
        found = asdict(replace(self, galleries={}))
        del found["galleries"]
        return found


@torch.no_grad()
def analyze(
    model: AdaptiveTokenizer,
    data: Path,
    *,
    scores: Path | None = None,
    segments: Path | None = None,
    out_of_domain: Path | None = None,
    networks: Networks = Networks(),  # noqa: B008 (immutable)
    thresholds: Sequence[float] = THRESHOLDS,
    limit: int | None = None,
    recursive: bool = True,
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
    seed: int = 0,
) -> Analysis:
    """Measure what a model's tokens correlate with: complexity, familiarity, a classifier's task, people's segments.

    Args:
        model: in evaluation mode, on its device.
        data: a folder of images; the center of each, of the model's shape, is read. An image takes as many bytes of
            memory as it has values.
        scores: a CSV file of people's judgment, see :func:`alit.analysis.inputs.read_scores`.
        segments: a folder of people's segments, see :func:`alit.analysis.inputs.read_segments`.
        out_of_domain: a second folder of images, of another kind.
        networks: with a classifier for the task, see :func:`alit.evaluation.classifier`.
        thresholds: values of L1 at which tokens are counted, ascending.
        limit: number of images to read from each folder, the first by name.
        seed: for everything that is drawn: changes of images, controls, the bootstrap.

    Raises:
        OSError, ValueError: a folder with fewer than 3 images that can be read, scores or segments that do not fit,
            no threshold or one that is not above 0, segments for a model that drops image tokens; the argument is
            named.
    """
    if not thresholds or not all(x > 0 for x in thresholds):
        raise ValueError(f"thresholds: expected numbers above 0, got {list(thresholds)}")
    if segments is not None and model.config.halting == "drop":
        raise ValueError(
            "segments: expected a model that keeps all image tokens, got halting='drop'"
        )
    size, its_lengths = model.config.image_size, model.config.lengths
    reading: dict[str, Any] = {
        "limit": limit,
        "recursive": recursive,
        "max_megapixels": max_megapixels,
    }
    images = read_images("data", data, size, **reading)
    second = None
    if out_of_domain is not None:
        second = read_images("out_of_domain", out_of_domain, size, **reading)
    judged = None if scores is None else read_scores(scores, images)
    labels = None if segments is None else read_segments(segments, images, size)
    left_out = list(networks.left_out)
    left_out += [] if scores is not None else ["scores: none were given"]
    left_out += [] if second is not None else ["second folder: none was given"]
    left_out += [] if labels is not None else ["specialization: no segments were given"]

    watcher = None if networks.classifier is None else task.Watcher(model, networks)
    errors_NK = errors(
        *(model, images.levels),
        batch_size=batch_size,
        watch=watcher,
    )
    shown = sorted(thresholds)[len(thresholds) // 2]
    galleries = {"complexity": complexity_gallery(model, images, errors_NK, shown)}
    its_complexity = complexity(
        *(images, errors_NK, its_lengths, judged), thresholds=thresholds, seed=seed
    )
    its_familiarity = familiarity(
        *(model, images, errors_NK, its_lengths, second),
        thresholds=thresholds,
        batch_size=batch_size,
        seed=seed,
    )
    number = len(images) // 2
    galleries["familiarity"] = familiarity_gallery(model, images, second, number, seed)
    its_task: list[task.Length] = []
    if watcher is not None:
        its_task = watcher.result(seed)
        galleries["task"] = task.gallery(model, images, watcher)
    its_specialization = None
    if labels is not None:
        its_specialization, galleries["specialization"] = specialization(
            *(model, images, labels),
            batch_size=batch_size,
            seed=seed,
        )
    return Analysis(
        len(images),
        None if second is None else len(second),
        seed,
        its_lengths,
        errors_NK.double().mean(0).tolist(),
        shown,
        its_complexity,
        its_familiarity,
        None if watcher is None else networks.classifier_name,
        its_task,
        its_specialization,
        left_out,
        images.skipped + ([] if second is None else second.skipped),
        galleries,
    )
