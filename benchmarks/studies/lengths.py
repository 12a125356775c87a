"""Predicted against searched lengths: ``python -m benchmarks.studies.lengths MODEL FOLDER``.

For several limits of the pixel error, over the images that some length meets: Spearman's rank correlation of the
lengths of ``Predicted`` and of ``MaxL1``, which decodes every iteration, their median difference, the share of images
within the limit at the predicted length, and predicted tokens over searched ones. Times of both and of given lengths,
in turns. The mean error of ``Budget(n)`` and of n tokens for each image, batch by batch.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from alit import AdaptiveTokenizer, Budget, Criterion, FixedLength, MaxL1, Predicted
from alit.folders import in_folder
from alit.images import load
from alit_kernels._clock import clocks, samples_in_turns

from ..harness.contest import THREADS
from ..harness.timing import OtherLoad, write

LIMITS = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
BUDGETS = (32, 64, 96, 128)
BATCH, ROUNDS = 16, 7


def got(model: AdaptiveTokenizer, images: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Numbers of tokens and mean absolute errors of the decoded images, (images,) each, encoded in batches."""
    lengths, errors = [], []
    for batch in images.split(BATCH):
        tokens = model.encode(batch, criterion)
        shown = model.decode(tokens)
        assert isinstance(shown, Tensor)
        lengths.append(tokens.lengths)
        errors.append((shown.clamp(0, 1) - batch).abs().mean((1, 2, 3)))
    return torch.cat(lengths).double(), torch.cat(errors)


def at_limit(model: AdaptiveTokenizer, images: Tensor, limit: float) -> dict[str, Any]:
    searched, error = got(model, images, MaxL1(limit))
    predicted, its_error = got(model, images, Predicted(max_l1=limit))
    met = error < limit
    ours, theirs = predicted[met], searched[met]
    return {
        "max_l1": limit,
        "met": float(met.double().mean()),
        "spearman": float(spearmanr(ours, theirs).statistic),
        "median_difference": float((ours - theirs).abs().median()),
        "within": float((its_error[met] < limit).double().mean()),
        "tokens_over_searched": float(ours.mean() / theirs.mean()),
    }


def times(model: AdaptiveTokenizer, images: Tensor, limit: float) -> dict[str, Any]:
    """Median seconds to encode one batch with given, predicted and searched lengths."""
    batch = images[:BATCH]
    lengths = model.encode(batch, Predicted(max_l1=limit)).lengths.tolist()
    criteria: dict[str, Criterion] = {
        "given": FixedLength(lengths),
        "predicted": Predicted(max_l1=limit),
        "searched": MaxL1(limit),
    }
    assert model.encode(batch, criteria["given"]).lengths.tolist() == lengths
    calls = {name: partial(model.encode, batch, own) for name, own in criteria.items()}
    found = samples_in_turns(clocks(calls), rounds=ROUNDS)
    return {"max_l1": limit} | {name: statistics.median(x) for name, x in found.items()}


def budget(model: AdaptiveTokenizer, images: Tensor, tokens: int) -> dict[str, Any]:
    spent, error = got(model, images, Budget(tokens))
    _, each = got(model, images, FixedLength(tokens))
    return {
        "budget": tokens,
        "tokens": float(spent.mean()),
        "l1": float(error.mean()),
        "l1_of_the_same_for_each": float(each.mean()),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = AdaptiveTokenizer.from_pretrained(options.model).eval()
    files = in_folder(options.folder).images
    images = torch.stack([load(file, model.config.image_size) for file in files])
    with OtherLoad() as other:
        timed = [times(model, images, limit) for limit in (0.06, 0.08)]
    results = {
        "images": len(files),
        "limits": [at_limit(model, images, limit) for limit in LIMITS],
        "times": timed,
        "other_load_percent": other.percent,
        "budgets": [budget(model, images, n) for n in BUDGETS],
    }
    write("lengths", results)


if __name__ == "__main__":
    main()
