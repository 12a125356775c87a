"""encode_stream, criteria in streams, and halting that drops tokens from the sequence."""

from __future__ import annotations

from collections.abc import Iterator
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
    Quirks,
    TokenAccuracy,
    TokenSequence,
    stage1_loss,
)
from tests.helpers.models import BASES, images, model, same_indices

every_base = pytest.mark.parametrize("base", BASES)
#: One image at its longest: class and 24 image tokens, 12 latents.
LONGEST = 37


@pytest.mark.parametrize(
    ("base", "kind", "halting"),
    [
        ("dct", MaxL1, "off"),
        ("vqgan", CodeError, "off"),
        ("vqgan", MaxL1, "drop"),
        ("vae", CodeError, "drop"),
    ],
)
def test_stream_equals_single(base: str, kind: type[MaxL1] | type[CodeError], halting: str) -> None:
    """A stream gives the lengths, indices and order of single images, for any ``max_tokens_in_flight``."""
    m, x = (
        model(base, halting=halting, halting_threshold=0.06 if base == "vqgan" else 0.5),
        images(7),
    )
    with torch.no_grad():
        errors = torch.stack([kind(0.0).error(iteration, m) for iteration in m.rollout(x)])
    # A limit between the first and the least error of an image, so that it needs more than one iteration.
    first, least = errors[0], errors.amin(0)
    criterion = kind(float((first + least)[(first - least).argmax()] / 2))
    expected = TokenSequence.concatenate([m.encode(one, criterion) for one in x.split(1)])
    assert len(set(expected.lengths.tolist())) > 1
    for room in (LONGEST, 3 * LONGEST):
        found = list(m.encode_stream(x, criterion, max_tokens_in_flight=room))
        tokens = TokenSequence.concatenate(found)
        assert torch.equal(tokens.lengths, expected.lengths)
        if not torch.equal(tokens.indices, expected.indices):
            raw = model(base, halting=halting, quirks=Quirks(unquantized_tokens=True))
            raw.load_state_dict(m.state_dict())
            latents = raw.encode(x, FixedLength(expected.lengths))
            same_indices(m, tokens.indices, expected.indices, latents.rows)


def test_stream_of_continuous_tokens() -> None:
    m, x = model(bottleneck="continuous"), images(5)
    lengths = FixedLength([3, 12, 6, 9, 3])
    found = list(m.encode_stream(x, lengths, max_tokens_in_flight=2 * LONGEST))
    expected = m.encode(x, lengths)
    tokens = TokenSequence.concatenate(found)
    assert torch.equal(tokens.lengths, expected.lengths)
    torch.testing.assert_close(tokens.rows, expected.rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bottleneck": "continuous"}, {"halting": "drop"}])
def test_one_length_for_all_images(options: dict[str, Any]) -> None:
    m, x = model(**options), images(3)
    for length in (3, 9, 12):
        one, each = (m.encode(x, FixedLength(n)) for n in (length, [length] * 3))
        assert torch.equal(one.lengths, each.lengths) and torch.equal(one.rows, each.rows)


def test_stream_is_bounded_lazy_and_reports() -> None:
    """No step exceeds the bound, and images are read from the source only as places become free."""
    m, x = model(), images(12)
    read = 0

    def source() -> Iterator[Tensor]:
        nonlocal read
        for image in x:
            read += 1
            yield image

    runs: list[int] = []
    m.encoder.register_forward_pre_hook(
        lambda module, arguments: runs.append(arguments[0].shape[:-1].numel())
    )
    seen: list[Progress] = []
    room = 4 * LONGEST
    lengths = FixedLength([3, 12, 6, 3, 9, 3, 3, 12, 6, 6, 3, 12])
    stream = m.encode_stream(source(), lengths, max_tokens_in_flight=room, on_progress=seen.append)
    assert read == 0
    first = next(stream)
    assert first.lengths.tolist() == [3] and read <= 5
    assert [int(tokens.lengths) for tokens in stream] == lengths.tokens.tolist()[1:]
    assert max(runs) <= room and runs == [progress.rows for progress in seen]
    assert (seen[-1].images_done, seen[-1].images_started, seen[-1].steps) == (12, 12, len(runs))
    one_by_one = int(lengths.tokens.sum()) // 3
    assert len(runs) < one_by_one / 2
    assert sum(runs) == sum(
        25 + 3 * (i + 1) for tokens in lengths.tokens.tolist() for i in range(tokens // 3)
    ), "every row that runs belongs to an image that is not done"


def test_stream_ends() -> None:
    m = model()
    assert list(m.encode_stream([], FixedLength(3), max_tokens_in_flight=LONGEST)) == []
    with torch.enable_grad():
        (tokens,) = m.encode_stream(images(1), FixedLength(3), max_tokens_in_flight=LONGEST)
        assert torch.is_grad_enabled() and not tokens.rows.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_in_flight": LONGEST - 1}, "max_tokens_in_flight: expected at least 37"),
        ({"criterion": FixedLength(13)}, "tokens: expected 1 to 12, got 13"),
        ({"criterion": FixedLength([3, 3])}, "tokens: expected one length per image, got 2"),
        (
            {"criterion": AnyOf(MaxL1(0.0), FixedLength([3, 3]))},
            "tokens: expected one length per image, got 2",
        ),
        ({"images": torch.rand(2, 3, 8, 9)}, r"images\[0\]: expected sides of at least 4 pixels"),
        (
            {"images": [images(1)[0], images(1)]},
            r"images\[1\]: expected shape \(3, height, width\)",
        ),
        (
            {"images": [images(1)[0], torch.rand(3, 48, 48)]},
            r"images\[1\]: expected at most 148 rows",
        ),
        ({"quirks": Quirks.official(), "criterion": MaxL1(0.1)}, "criterion: the published rule"),
        ({"criterion": TokenAccuracy(0.5)}, "TokenAccuracy: expected a base tokenizer with"),
    ],
)
def test_wrong_streams(options: dict[str, Any], message: str) -> None:
    m = model(quirks=options.pop("quirks", Quirks()))
    arguments = {"criterion": FixedLength(3), "max_tokens_in_flight": 4 * LONGEST, **options}
    x, criterion = arguments.pop("images", images(3)), arguments.pop("criterion")
    with pytest.raises(ValueError, match=message):
        list(m.encode_stream(x, criterion, **arguments))


def dropping(base: str, **options: Any) -> AdaptiveTokenizer:
    return model(
        base, halting="drop", halting_threshold=0.06 if base == "vqgan" else 0.45, **options
    )


@every_base
@torch.no_grad()
def test_dropping_equals_shorter_sequences(base: str) -> None:
    """The rollout equals that of each image alone with halted tokens cut out of a dense sequence."""
    m, x = dropping(base), images(4)
    rollout = m.rollout(x)
    iterations = list(rollout)
    counts = []
    for b in range(len(x)):
        alone = m.rollout(x[b : b + 1])
        sequence = alone.tokens_BSD
        kept = torch.ones(24, dtype=torch.bool)
        for iteration in iterations:
            encoded = m.encoder(sequence)
            images_in = 1 + int(kept.sum())
            latents = encoded[:, images_in:]
            torch.testing.assert_close(latents[0], iteration.latents_BLD[b], rtol=1e-4, atol=1e-4)
            image_tokens = encoded[:, :images_in]
            torch.testing.assert_close(
                image_tokens[0, 1:], iteration.image_tokens_BND[b, 1:][kept], rtol=1e-4, atol=1e-4
            )
            if iteration.index == 3:
                assert iteration.halted is None
                break
            assert not (iteration.halted[b] & kept).all() or not kept.any()
            stays = ~iteration.halted[b][kept]
            kept = kept & ~iteration.halted[b]
            counts.append(int(kept.sum()))
            image_tokens = torch.cat([image_tokens[:, :1], image_tokens[:, 1:][:, stays]], dim=1)
            sequence = m.next_input(image_tokens, latents, None, iteration.index + 1)
    assert len(set(counts)) > 2, "different images keep different numbers of tokens"


def test_dropped_tokens_cost_nothing_and_stay_away() -> None:
    m, x = dropping("vqgan"), images(3)
    runs: list[int] = []
    m.encoder.register_forward_pre_hook(
        lambda module, arguments: runs.append(arguments[0].shape[:-1].numel())
    )
    with torch.no_grad():
        halted = [iteration.halted for iteration in m.rollout(x)]
    dropped = [0, *(int(h.sum()) for h in halted[:-1])]
    assert runs == [3 * (28 + 3 * i) - n for i, n in enumerate(dropped)] and dropped[1] > 0
    for earlier, later in pairwise(halted[:-1]):
        assert bool((later | ~earlier).all())


@torch.no_grad()
def test_everything_may_be_dropped() -> None:
    m = model("vqgan", halting="drop", halting_threshold=0.0)
    *_, last = m.rollout(images())
    assert last.latents_BLD.isfinite().all()
    assert not last.image_tokens_BND[:, 1:].any()


@pytest.mark.parametrize("halting", ["off", "mask", "drop"])
@every_base
def test_trains_with_every_halting(base: str, halting: str) -> None:
    """The gradient equals the slope of the loss while tokens halt."""
    m = model(base, bottleneck="continuous", halting=halting).double()
    m.base_tokenizer.requires_grad_(False)
    parameters = [p for p in m.parameters() if p.requires_grad]
    x = images().double()
    halts = torch.rand(3, 24) < 0.3
    # Halt fixed tokens: with a threshold the loss would jump where a step takes a token across it.
    m.halted = lambda *_: halts  # type: ignore[method-assign, assignment]

    def loss() -> Tensor:
        return stage1_loss(m, x).total

    loss().backward()
    used = [p for p in parameters if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in used if p.grad is not None]).norm()

    @torch.no_grad()
    def moved(by: float) -> float:
        for p in used:
            p += by / norm * p.grad
        return float(loss())

    step = 1e-4
    rise = moved(step) - moved(-2 * step)
    assert rise == pytest.approx(2 * step * float(norm), rel=0.02)
