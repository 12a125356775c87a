"""Stopping criteria: any length, criteria by the token, limits that no length meets, combinations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    AllOf,
    AnyOf,
    CodeError,
    Criterion,
    ErrorCriterion,
    FixedLength,
    MaxL1,
    MinSSIM,
    Quirks,
    RelativeL1,
    TokenAccuracy,
    TokenSequence,
)
from alit.pixel_errors import LEAST_CONTRAST, structural_similarity
from tests.helpers.models import BASES, VARIANTS, images, model


def pixels_of(m: AdaptiveTokenizer, x: Tensor, iteration: int, length: int) -> Tensor:
    """Images decoded from the first ``length`` tokens, encoded with ``iteration + 1`` iterations."""
    tokens = m.encode(x, FixedLength(3 * (iteration + 1)))
    return m.decode(tokens.truncated(length))


def errors_of(m: AdaptiveTokenizer, x: Tensor, iteration: int, length: int) -> list[float]:
    return (pixels_of(m, x, iteration, length).clamp(0, 1) - x).abs().mean((1, 2, 3)).tolist()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_length(base: str, variant: str) -> None:
    """A length of n keeps the first n tokens of the iterations it takes: one length, one each, and in streams."""
    m, x = model(base, bottleneck=variant), images()
    whole = [m.encode(x, FixedLength(n)) for n in (3, 6, 9, 12)]
    for n in range(1, 13):
        one, each = m.encode(x, FixedLength(n)), m.encode(x, FixedLength([n] * 3))
        expected = whole[(n - 1) // 3].truncated(n)
        for found in (one, each):
            assert found.lengths.tolist() == [n] * 3 and torch.equal(found.rows, expected.rows)
    lengths = FixedLength([5, 12, 1])
    mixed = m.encode(x, lengths)
    assert mixed.lengths.tolist() == [5, 12, 1]
    stream = TokenSequence.concatenate(list(m.encode_stream(x, lengths, max_tokens_in_flight=90)))
    for found in (mixed, stream):
        torch.testing.assert_close(found[0].rows, whole[1].truncated(5)[0].rows)
        torch.testing.assert_close(found[2].rows, whole[0].truncated(1)[2].rows)
    assert m.decode(mixed).shape == x.shape


def test_truncated() -> None:
    values = torch.arange(9)
    tokens = TokenSequence(torch.tensor([2, 3, 4]), indices=values)
    short = tokens.truncated(torch.tensor([1, 3, 2]))
    assert short.lengths.tolist() == [1, 3, 2] and short.rows.tolist() == [0, 2, 3, 4, 5, 6]
    assert tokens.truncated(1).rows.tolist() == [0, 2, 5]
    latents = TokenSequence(torch.tensor([2, 1]), latents=torch.eye(3))
    assert torch.equal(latents.truncated(1).rows, torch.eye(3)[[0, 2]])
    for wrong, message in (
        (0, "tokens: expected 1 to 2, got 0 for image 0"),
        (3, "tokens: expected 1 to 2, got 3 for image 0"),
        (torch.tensor([2, 3, 5]), "tokens: expected 1 to 4, got 5 for image 2"),
        (torch.tensor([2, 3]), r"tokens: expected an integer or \(3,\) of them"),
        (1.5, "tokens: expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            tokens.truncated(wrong)


def expected_length(m: AdaptiveTokenizer, x: Tensor, limit: float) -> int:
    """Length that bisection should find in the first iteration within the limit."""
    for iteration in range(4):
        if errors_of(m, x, iteration, 3 * iteration + 3)[0] < limit:
            ends = range(3 * iteration + 1, 3 * iteration + 4)
            good = [errors_of(m, x, iteration, n)[0] < limit for n in ends]
            # Bisection of three lengths: the middle one first, then the remaining one.
            if good[1]:
                return ends[0] if good[0] else ends[1]
            return ends[2]
    raise AssertionError(limit)


@pytest.mark.parametrize(
    "options",
    [{}, {"bottleneck": "continuous"}, {"recurrence": "residual", "codebooks": "each"}],
    ids=range(3),
)
def test_fewest_tokens_of_an_iteration(options: dict[str, Any]) -> None:
    m, x = model(any_length=True, **options), images(6)
    table = torch.tensor([errors_of(m, x, i, 3 * i + 3) for i in range(4)])
    limit = float(table.flatten().sort().values[11:13].mean())
    met = [i for i in range(6) if bool((table[:, i] < limit).any())]
    tokens = m.encode(x[met], MaxL1(limit))
    expected = [expected_length(m, x[i : i + 1], limit) for i in met]
    assert tokens.lengths.tolist() == expected
    assert any(n % 3 for n in expected)
    stream = list(m.encode_stream(x[met], MaxL1(limit), max_tokens_in_flight=100))
    assert [int(one.lengths) for one in stream] == expected
    pixels = m.decode(tokens)
    assert bool(((pixels.clamp(0, 1) - x[met]).abs().mean((1, 2, 3)) < limit + 1e-6).all())
    plain = model(**options).encode(x[met], MaxL1(limit))
    assert plain.lengths.tolist() == [-(-n // 3) * 3 for n in expected]


@pytest.mark.parametrize("kind", [MaxL1, RelativeL1, CodeError, MinSSIM, TokenAccuracy])
@pytest.mark.parametrize("any_length", [False, True])
def test_a_limit_that_no_length_meets(kind: Any, any_length: bool) -> None:
    """A limit that is never met keeps the first iteration within 1 % of the best error, and no more tokens of it."""
    m, x = model("vqgan", any_length=any_length), images(6)
    impossible = kind(1.0 if issubclass(kind, MinSSIM | TokenAccuracy) else 0.0)
    with torch.no_grad():
        errors = torch.stack([impossible.error(i, m) for i in m.rollout(x)])
    first = (errors <= 1.01 * errors.amin(0)).int().argmax(0)
    tokens = m.encode(x, impossible)
    if any_length:
        assert ((tokens.lengths - 1) // 3).tolist() == first.tolist()
    else:
        assert tokens.lengths.tolist() == (3 * (first + 1)).tolist()
    if any_length and kind is MaxL1:
        found = (m.decode(tokens).clamp(0, 1) - x).abs().mean((1, 2, 3))
        assert bool((found <= 1.01 * errors.amin(0) + 1e-6).all())


class Tokens:
    """Stopping criterion without measurements: stop at ``tokens`` tokens."""

    needs_prediction = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, iteration: Any, m: object) -> Tensor:
        done = iteration.num_tokens >= self.tokens
        return torch.full((iteration.batch_size,), done, dtype=torch.bool)


@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (AnyOf(FixedLength(5), FixedLength([12, 3, 1])), [5, 3, 1]),
        (AllOf(FixedLength(5), FixedLength([12, 3, 1])), [12, 5, 5]),
        (AnyOf(MaxL1(0.0), FixedLength(7)), [7, 7, 7]),
        (AllOf(AnyOf(MaxL1(0.0), FixedLength(4)), FixedLength([1, 2, 11])), [4, 4, 11]),
        (AnyOf(Tokens(6), FixedLength(11)), [6, 6, 6]),
        (AllOf(Tokens(6), FixedLength([1, 4, 8])), [6, 6, 9]),
        (Tokens(99), [12, 12, 12]),
        (AnyOf(Tokens(99), MaxL1(0.0)), [12, 12, 12]),
    ],
    ids=range(8),
)
def test_criteria_of_criteria(criterion: Criterion, expected: list[int], any_length: bool) -> None:
    m, x = model(any_length=any_length), images()
    assert m.encode(x, criterion).lengths.tolist() == expected
    stream = m.encode_stream(x, criterion, max_tokens_in_flight=60)
    assert [int(one.lengths) for one in stream] == expected


@torch.no_grad()
def test_any_and_all_of_two_errors() -> None:
    m, x = model(), images(6)
    table = torch.stack([MaxL1(0.0).error(i, m) for i in m.rollout(x)])
    other = torch.stack([CodeError(0.0).error(i, m) for i in m.rollout(x)])
    limits = [float(t.flatten().sort().values[11:13].mean()) for t in (table, other)]
    one, two = table < limits[0], other < limits[1]
    for kind, met, combined in ((AnyOf, one | two, torch.amin), (AllOf, one & two, torch.amax)):
        scaled = torch.stack([table.double() / limits[0], other.double() / limits[1]])
        error = combined(scaled, 0)
        near = (error <= 1.01 * error.amin(0)).int().argmax(0)
        expected = torch.where(met.any(0), met.int().argmax(0), near)
        lengths = m.encode(x, kind(MaxL1(limits[0]), CodeError(limits[1]))).lengths
        assert lengths.tolist() == (3 * (expected + 1)).tolist()


@torch.no_grad()
def test_relative_error_and_similarity() -> None:
    m, x = model(), images()
    x[1] = 0.5  # flat
    x[2] = 0.4 + 0.2 * x[2]
    (first, *_) = m.rollout(x)
    shown = m.pixels(first.prediction).clamp(0, 1)
    contrast = [(p - p.mean((1, 2), keepdim=True)).abs().mean() for p in x]
    assert contrast[1] < 1e-6 and contrast[2] > LEAST_CONTRAST
    floor = torch.stack(contrast).clamp(min=LEAST_CONTRAST)
    expected = (shown - x).abs().mean((1, 2, 3)) / floor
    torch.testing.assert_close(RelativeL1(0.3).error(first, m), expected)
    score = MinSSIM(0.3).score(first, m)
    torch.testing.assert_close(score, structural_similarity(x, shown))
    limit = float(score.median())
    assert MinSSIM(limit)(first, m).tolist() == (score >= limit).tolist()


def test_published_fallback_is_of_errors_alone() -> None:
    """With the published fallback, other criteria than errors still keep the first iteration within 1 % of the best."""
    m, x = model("vqgan", quirks=Quirks(best_iteration_fallback=True)), images(4)
    with torch.no_grad():
        errors = torch.stack([TokenAccuracy(1.0).error(i, m) for i in m.rollout(x)])
    first = (errors <= 1.01 * errors.amin(0)).int().argmax(0)
    assert m.encode(x, TokenAccuracy(1.0)).lengths.tolist() == (3 * (first + 1)).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (AnyOf, "criteria: expected at least one in AnyOf, got none"),
        (lambda: AllOf(MaxL1(0.1), 3), "criterion: expected FixedLength, .*, got int"),
        (lambda: MinSSIM(1.5), "threshold: expected at most 1, got 1.5"),
        (lambda: MinSSIM(-1), "threshold: expected at least 0, got -1"),
        (lambda: RelativeL1("x"), "threshold: expected a number, got str"),
        (
            lambda: model().encode(images(), AnyOf(MaxL1(0.1), FixedLength(13))),
            "tokens: expected 1 to 12, got 13",
        ),
        (
            lambda: model().encode(images(), AllOf(FixedLength([1, 2]), MaxL1(0.1))),
            r"tokens: expected one length per image \(3\), got 2",
        ),
        (
            lambda: model(image_size=(4, 8)).encode(torch.rand(1, 3, 4, 8), MinSSIM(0.5)),
            "images: expected at least 7x7 pixels for SSIM, got 4x8",
        ),
    ],
    ids=range(8),
)
def test_wrong_criteria(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_error_of_ones_own() -> None:
    class Worst(ErrorCriterion):
        def error(self, iteration: Any, m: Any) -> Tensor:
            return (m.pixels(iteration.prediction) - iteration.images).abs().amax((1, 2, 3))

    class Whole(ErrorCriterion):
        def error(self, iteration: Any, m: Any) -> Tensor:
            return (m.pixels(iteration.prediction) - iteration.images).abs().amax()

    m, x = model(any_length=True), images()
    assert bool((m.encode(x, Worst(9.0)).lengths == 1).all())
    with pytest.raises(
        ValueError, match=r"expected Whole to give \(3,\) bool, got \(\) torch.bool"
    ):
        m.encode(x, Whole(9.0))
