"""Evaluation of each iteration: the use of its own codes, and the error without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alit import FixedLength, TokenSequence
from alit.evaluation import evaluate
from alit.evaluation.iterations import IterationMeasures
from alit.images import load_square
from tests.helpers.models import config, model


@pytest.mark.parametrize(
    "options", [{}, {"recurrence": "residual", "codebooks": "each"}], ids=["published", "residual"]
)
def test_codes_are_those_at_its_positions_of_the_longest_length(
    folder: Path, options: dict[str, Any]
) -> None:
    m, files = model(image_size=(16, 16), **options), sorted(folder.rglob("*.png"))
    result = evaluate(m, files, batch_size=3)
    x = torch.stack([load_square(file, 16) for file in files])
    index = m.encode(x, FixedLength(12)).padded()
    assert [(x.first, x.last) for x in result.iterations] == [(0, 2), (3, 5), (6, 8), (9, 11)]
    for found in result.iterations:
        own = index[:, found.first : found.last + 1].flatten()
        share = np.bincount(own) / len(own)
        entropy = -sum(p * math.log(p) for p in share if p > 0)
        assert found.perplexity == pytest.approx(math.exp(entropy))
        assert found.codes_used == len(own.unique()) / 32
    # Cumulative values of the shared codebook, or of all codebooks.
    last = result.lengths[-1]
    if options:
        each = result.iterations
        assert last.codes_used == pytest.approx(sum(x.codes_used for x in each) / 4)
        assert last.perplexity == pytest.approx(math.prod(x.perplexity for x in each) ** 0.25)
        assert result.lengths[0].perplexity == pytest.approx(each[0].perplexity)
    else:
        assert last.codes_used == len(index.unique()) / 32


def test_replaced_does_not_depend_on_the_batches(folder: Path) -> None:
    m, files = model(image_size=(16, 16)), sorted(folder.rglob("*.png"))
    several, single = (
        [x.replaced for x in evaluate(m, files, batch_size=n).iterations] for n in (5, 1)
    )
    assert several == pytest.approx(single, abs=1e-5)
    assert several != pytest.approx([evaluate(m, files).lengths[-1].model.l1] * 4, abs=1e-5)


class Position:
    """Fake model whose images encode their tokens; tokens of the last iteration have no effect."""

    def decode(self, tokens: TokenSequence) -> torch.Tensor:
        shares = tokens.padded()[:, :9].double() / 31
        return shares.mean(1)[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.mark.parametrize("truncated", [False, True])
def test_a_dead_iteration_costs_nothing(truncated: bool) -> None:
    stub: Any = Position()
    index = torch.zeros(4, 12, dtype=torch.int64)
    measures = IterationMeasures(config())
    measures.add(stub, torch.zeros(4, 3, 8, 8), index, truncated=truncated)
    found = [x.replaced for x in measures.result()]
    random = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    for iteration, error in enumerate(found[:3]):
        part = random[:, 3 * iteration : 3 * iteration + 3].double().sum(1) / 9 / 31
        assert error == pytest.approx(float(part.mean()), abs=1 / 255)
        assert error > 0.05
    assert found[3] == 0
    assert {(x.codes_used, x.perplexity) for x in measures.result()} == {(1 / 32, 1.0)}
    assert bool((index == 0).all()), "the caller's are as they were"


def test_tokens_that_are_no_codes(folder: Path) -> None:
    m = model(image_size=(16, 16), bottleneck="continuous")
    assert evaluate(m, sorted(folder.rglob("*.png"))[:2]).iterations == []
