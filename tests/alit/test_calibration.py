"""Calibration of criteria: requested errors against the errors reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alit import CodeError, FixedLength, MaxL1, MinSSIM, Quirks
from alit.evaluation import calibrate, drawings, usual_limits
from alit.evaluation.calibration import USUAL
from alit.images import load_square
from tests.helpers.models import model


@pytest.fixture
def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def test_max_l1(files: list[Path]) -> None:
    """Rows for MaxL1 equal those of images encoded and decoded here, at limits that some images meet."""
    m = model(image_size=(16, 16))
    x = torch.stack([load_square(file, 16) for file in files])

    def errors(tokens: Any) -> torch.Tensor:
        return (m.decode(tokens).clamp(0, 1) - x).abs().mean((1, 2, 3))

    each = torch.stack([errors(m.encode(x, FixedLength(n))) for n in (3, 6, 9, 12)])
    limits = [float(each.min()) * 0.9, *each.quantile(torch.tensor([0.3, 0.6])).tolist(), 9.0]
    found = calibrate(m, files, [MaxL1(limit) for limit in limits], batch_size=3)
    assert [row.limit for row in found] == limits
    for row in found:
        tokens = m.encode(x, MaxL1(row.limit))
        got = errors(tokens)
        assert row.criterion == "MaxL1"
        assert row.tokens == pytest.approx(float(tokens.lengths.double().mean()))
        assert row.error == pytest.approx(float(got.mean()), abs=1e-5)
        assert row.within == pytest.approx(float((got < row.limit).double().mean()))
        met = (each.amin(0) < row.limit).double().mean()
        assert row.met == pytest.approx(float(met))
    assert (found[0].met, found[0].within) == (0, 0)
    assert (found[-1].met, found[-1].tokens, found[-1].within) == (1, 3, 1)


def test_one_criterion_measures_what_another_foresees(files: list[Path]) -> None:
    m = model(image_size=(16, 16))
    x = torch.stack([load_square(file, 16) for file in files])
    each = [
        (m.decode(m.encode(x, FixedLength(n))) - x).abs().mean((1, 2, 3)) for n in (3, 6, 9, 12)
    ]
    best = torch.stack(each).amin(0)
    image = int((each[1] - best).argmax())
    limit = (
        float((each[1] + best)[image]) / 2
    )  # which some length meets, and that of 6 tokens does not
    always, code = calibrate(m, files, [(FixedLength(6), MaxL1(limit)), CodeError(0.0)])
    assert (always.criterion, always.limit, always.tokens) == ("FixedLength", limit, 6)
    assert always.within == pytest.approx(float((each[1] < limit).double().mean()))
    assert always.met > always.within
    assert (code.criterion, code.met, code.within) == ("CodeError", 0, 0)
    assert code.error > 0


@pytest.mark.parametrize(
    "options",
    [{"bottleneck": "continuous"}, {"base": "vqgan"}, {"quirks": Quirks(unquantized_tokens=True)}],
)
def test_other_models(files: list[Path], options: dict[str, Any]) -> None:
    rows = calibrate(model(image_size=(16, 16), **options), files[:2], [CodeError(0.01)])
    assert rows[0].tokens > 0 and rows[0].error > 0


def test_usual_limits(files: list[Path]) -> None:
    """Usual limits of each criterion rise and lie within the errors of the images, for drawings too."""
    m = model(image_size=(16, 16))
    done: list[int] = []
    found = usual_limits(m, files, count=3, batch_size=4, on_batch=done.append)
    assert done == [4, 7]
    rows = calibrate(m, files, found, on_batch=done.append)
    assert [row.limit for row in rows] == [x.limit for x in found]
    by_kind = {kind: [r for r in rows if r.criterion == kind.__name__] for kind in USUAL}
    assert [row for own in by_kind.values() for row in own] == rows
    for kind, own in by_kind.items():
        limits = [row.limit for row in own]
        assert limits == sorted(set(limits)) and limits, kind
        # The images of random weights have too little structure for limits of two digits.
        assert kind is MinSSIM or (len(own) == 3 and own[0].met < own[2].met), kind
    assert len(usual_limits(m, drawings(16)[::4])) > 2


def test_bad_criteria(files: list[Path]) -> None:
    m = model(image_size=(16, 16))
    with pytest.raises(ValueError, match="criteria: expected at least one, got none"):
        calibrate(m, files, [])
    alone: Any = FixedLength(3)
    for criterion in (alone, (MaxL1(0.1), alone)):
        with pytest.raises(TypeError, match=r"criteria: expected .* measures .* got FixedLength"):
            calibrate(m, files, [criterion])
    with pytest.raises(ValueError, match="protocol: expected"):
        calibrate(m, files, [MaxL1(0.1)], protocol="paper")
