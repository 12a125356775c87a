"""The residual recurrence: an iteration encodes the error of the decoder's prediction from the tokens so far."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    AnyOf,
    CodeError,
    FixedLength,
    MaxL1,
    Progress,
    RelativeL1,
    TokenSequence,
)
from alit.base.interface import to_grid
from tests.helpers import models
from tests.helpers.models import config, images

#: Tokens of an iteration, iterations, class and 24 image tokens, as in ``tests.helpers.models``.
STEP, ITERATIONS, ROWS = 3, 4, 25
LONGEST = STEP * ITERATIONS
RESIDUAL: dict[str, Any] = {"recurrence": "residual", "codebooks": "each"}

continuous_base = pytest.mark.parametrize("base", ["dct", "vae"])


def model(base: str = "dct", **options: Any) -> AdaptiveTokenizer:
    return models.model(base, **RESIDUAL, **options)


def alone(m: AdaptiveTokenizer, x: Tensor, criterion: Any) -> TokenSequence:
    """Tokens of images that are encoded each in a batch of its own."""
    return TokenSequence.concatenate([m.encode(image, criterion) for image in x.split(1)])


def between(m: AdaptiveTokenizer, x: Tensor, kind: Callable[[float], Any]) -> Any:
    """Criterion of ``kind`` that images meet after different iterations, some never."""
    with torch.no_grad():
        errors = torch.stack([kind(0.0).error(step, m) for step in m.rollout(x)])
    return kind(float(errors.quantile(0.3)))


@torch.no_grad()
@continuous_base
def test_an_iteration_sees_what_is_missing(base: str) -> None:
    """The encoder's input is that of an image whose base tokens are the prediction's residual."""
    m, x = model(base), images()
    runs: list[Tensor] = []
    m.encoder.register_forward_pre_hook(lambda _, given: runs.append(given[0]))
    steps = list(m.rollout(x))
    assert [run.shape[1] for run in runs] == [ROWS + STEP] * ITERATIONS
    true = steps[0].base
    for t, run in enumerate(runs):
        tokens_BCHW = true.tokens_BCHW
        if t:
            prediction = steps[t - 1].prediction
            assert prediction is not None
            tokens_BCHW = to_grid(true.code_BNC - prediction.code_BNC, m.config.grid)
        tokens = m.image_tokens(x, tokens_BCHW)
        fresh = m.fresh_latents(t).expand(len(x), -1, -1)
        norm = m.encoder_ln_recursive if t else m.encoder_ln_pre
        torch.testing.assert_close(run, norm(torch.cat([tokens, fresh], dim=1)))
    for t, step in enumerate(steps):
        assert step.num_tokens == (t + 1) * STEP
        assert step.latents_BLD.shape[1] == STEP, "the fresh ones"
        assert step.bottleneck.quantized is not None
        assert step.bottleneck.quantized.index.shape == (len(x), STEP)
        assert (step.decoded is None) == (t == ITERATIONS - 1)


@torch.no_grad()
def test_tokens_are_final() -> None:
    m, x = model(), images()
    steps = list(m.rollout(x))
    for shorter, longer in pairwise(steps):
        a, b = shorter.bottleneck, longer.bottleneck
        assert a.index_BL is not None and b.index_BL is not None
        n = shorter.num_tokens
        assert torch.equal(a.index_BL, b.index_BL[:, :n])
        assert torch.equal(a.codes_BLC, b.codes_BLC[:, :n])
        assert torch.equal(a.continuous_BLC, b.continuous_BLC[:, :n])


@continuous_base
@pytest.mark.parametrize("n", range(1, LONGEST + 1))
def test_a_shorter_description_begins_the_longest(base: str, n: int) -> None:
    m, x = model(base), images()
    shorter, longest = (m.encode(x, FixedLength(k)) for k in (n, LONGEST))
    cut = longest.truncated(n)
    assert torch.equal(shorter.rows, cut.rows) and torch.equal(shorter.lengths, cut.lengths)
    assert torch.equal(m.decode(shorter), m.decode(cut))


def test_lengths_of_their_own() -> None:
    m, x = model(), images(6)
    lengths = torch.tensor([1, 3, 4, 12, 7, 6])
    found, longest = m.encode(x, FixedLength(lengths)), m.encode(x, FixedLength(LONGEST))
    assert torch.equal(found.lengths, lengths)
    assert torch.equal(found.rows, longest.truncated(lengths).rows)
    for b, pixels in enumerate(m.decode(found)):
        torch.testing.assert_close(pixels, m.decode(found[b])[0], atol=1e-4, rtol=1e-4)


@continuous_base
@pytest.mark.parametrize("kind", [CodeError, MaxL1, RelativeL1])
@pytest.mark.parametrize("any_length", [False, True])
def test_batched_equals_single(base: str, kind: type[Any], any_length: bool) -> None:
    """Adaptive encoding in batches and in streams of any bound equals that of single images."""
    m, x = model(base, any_length=any_length), images(7)
    criterion = between(m, x, kind)
    expected = alone(m, x, criterion)
    assert len(set(expected.lengths.tolist())) > 1
    found = [m.encode(x, criterion), m.encode(list(x), criterion)]
    for room in (ROWS + LONGEST, 3 * (ROWS + LONGEST)):
        stream = m.encode_stream(x, criterion, max_tokens_in_flight=room)
        found.append(TokenSequence.concatenate(list(stream)))
    for tokens in found:
        assert torch.equal(tokens.lengths, expected.lengths)
        assert torch.equal(tokens.rows, expected.rows)
    longest = m.encode(x, FixedLength(LONGEST))
    assert torch.equal(expected.rows, longest.truncated(expected.lengths).rows)


def test_the_first_length_that_is_enough() -> None:
    """The length kept meets the criterion, and no earlier iteration does."""
    m, x = model(), images(7)
    criterion = between(m, x, CodeError)
    tokens = m.encode(x, criterion)
    with torch.no_grad():
        met = torch.stack([criterion(step, m) for step in m.rollout(x)])
        errors = torch.stack([criterion.error(step, m) for step in m.rollout(x)])
    for b, n in enumerate(tokens.lengths.tolist()):
        last = n // STEP - 1
        assert not bool(met[:last, b].any())
        assert bool(met[last, b]) or errors[last, b] <= 1.01 * errors[:, b].min()
    assert bool(met[-1].any()) and not bool(met.any(0).all()), "some do, some never do"


def test_a_combination_of_criteria() -> None:
    m, x = model(), images(5)
    criterion = AnyOf(between(m, x, CodeError), FixedLength(2 * STEP))
    found, expected = m.encode(x, criterion), alone(m, x, criterion)
    assert torch.equal(found.rows, expected.rows)
    assert int(found.lengths.max()) <= 2 * STEP


@torch.no_grad()
@pytest.mark.parametrize("mask", [True, False])
def test_images_leave_the_batch(mask: bool) -> None:
    """Images that stay in the batch continue as they would alone."""
    m, x = model(), images(5)
    kept = torch.tensor([1, 3, 4])
    keep = torch.isin(torch.arange(5), kept) if mask else kept
    rollout, expected = m.rollout(x), list(m.rollout(x[kept]))
    next(rollout)
    rollout.keep(keep)
    for iteration, other in zip(rollout, expected[1:], strict=True):
        assert torch.equal(iteration.image_index_B, kept)
        assert iteration.bottleneck.index_BL is not None
        assert torch.equal(iteration.bottleneck.index_BL, other.bottleneck.index_BL)
        assert iteration.prediction is not None and other.prediction is not None
        torch.testing.assert_close(
            iteration.prediction.code_BNC, other.prediction.code_BNC, atol=1e-4, rtol=1e-4
        )


@continuous_base
def test_images_of_any_size(base: str) -> None:
    m, draw = model(base), torch.Generator().manual_seed(3)
    sizes = [(16, 24), (24, 16), (4, 4), (8, 40), (24, 16), (32, 32)]
    x = [torch.rand(3, *size, generator=draw) for size in sizes]
    lengths = [3, 12, 5, 6, 9, 1]
    batch, longest = m.encode(x, FixedLength(lengths)), m.encode(x, FixedLength(LONGEST))
    assert torch.equal(batch.rows, longest.truncated(torch.tensor(lengths)).rows)
    stream = m.encode_stream(iter(x), FixedLength(lengths), max_tokens_in_flight=300)
    found = TokenSequence.concatenate(list(stream))
    assert torch.equal(found.rows, batch.rows) and torch.equal(found.sizes, batch.sizes)
    for image, pixels, one in zip(x, m.decode(batch), range(6), strict=True):
        single = m.encode([image], FixedLength(lengths[one]))
        assert torch.equal(single.rows, batch[one].rows)
        torch.testing.assert_close(pixels, m.decode(single)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [STEP, LONGEST, 5])
def test_decode(n: int) -> None:
    """Decoding tokens read from bytes gives the rollout's prediction."""
    m, x = model(), images()
    step = list(m.rollout(x))[(n - 1) // STEP]
    tokens = TokenSequence.from_bytes(m.encode(x, FixedLength(n)).to_bytes(m.identity()))
    lengths = None if n == step.num_tokens else torch.full((3,), n)
    expected = m.pixels(m.predict(step.bottleneck.codes_BLC, None, lengths))
    torch.testing.assert_close(m.decode(tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_stream_is_bounded() -> None:
    """Each step of a stream computes at most the given number of rows."""
    m, x, seen = model(), images(9), list[Progress]()
    runs: list[int] = []
    m.encoder.register_forward_pre_hook(lambda _, given: runs.append(given[0].shape[:-1].numel()))
    lengths, room = FixedLength([3, 12, 6, 3, 9, 3, 3, 12, 6]), 4 * (ROWS + LONGEST)
    stream = m.encode_stream(x, lengths, max_tokens_in_flight=room, on_progress=seen.append)
    assert [int(tokens.lengths) for tokens in stream] == lengths.tokens.tolist()
    assert max(runs) <= room and runs == [progress.rows for progress in seen]
    assert sum(runs) == (ROWS + STEP) * int(lengths.tokens.sum()) // STEP


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("dct", {"bottleneck": "continuous"}, "bottleneck: expected 'quantized' .* 'continuous'"),
        ("dct", {"bottleneck": "unfactorized"}, "bottleneck: expected 'quantized'"),
        ("dct", {"codebooks": "shared"}, "codebooks: expected 'each' .* got 'shared'"),
        ("dct", {"halting": "mask"}, "halting: expected 'off' .* got 'mask'"),
        ("dct", {"halting": "drop"}, "halting: expected 'off' .* got 'drop'"),
        ("vqgan", {}, "base: recurrence 'residual' needs a continuous base, got 'vqgan'"),
        ("dct", {"recurrence": "both"}, "recurrence: expected one of latents, residual"),
    ],
)
def test_configurations_that_are_refused(base: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config(base, **{**RESIDUAL, **options})


def test_one_iteration_is_the_published_one() -> None:
    """The first iteration of both recurrences is the same."""
    residual, published = model(), models.model(codebooks="each")
    published.load_state_dict(residual.state_dict())
    found, expected = (m.encode(images(), FixedLength(STEP)) for m in (residual, published))
    assert torch.equal(found.rows, expected.rows)
    longer = [m.encode(images(), FixedLength(LONGEST)) for m in (residual, published)]
    assert not torch.equal(longer[0].rows, longer[1].rows)


@pytest.mark.parametrize(("tokens", "runs"), [(3, 0), (4, 1), (6, 1), (7, 2), ([3, 8, 5], 2)])
def test_nothing_is_decoded_for_an_iteration_that_nobody_takes(
    tokens: Any, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With given lengths the decoder runs only between iterations."""
    m, counted = model(), []

    def decode(codes: Any, *rest: Any, actual: Any = m.decoder.decode) -> Any:
        counted.append(len(codes))
        return actual(codes, *rest)

    monkeypatch.setattr(m.decoder, "decode", decode)
    m.encode(images(3), FixedLength(tokens))
    assert len(counted) == runs


def test_how_many_iterations_a_caller_takes() -> None:
    m = model()
    assert len(list(m.rollout(images(), iterations=2))) == 2
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"^iterations: expected 1 to 4, got {wrong}"):
            m.rollout(images(), iterations=wrong)
