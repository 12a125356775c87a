"""Images of other sizes than the model's: lists and streams of them, positions, sequences that carry sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    Budget,
    CodeError,
    FixedLength,
    MaxL1,
    Predicted,
    Quirks,
    TokenSequence,
)
from alit.sizes import learned_place
from tests.helpers.models import BASES, images, model, same_indices

every_base = pytest.mark.parametrize("base", BASES)
#: Heights and widths in pixels, with patches of 4; the model's own are 16 x 24.
SIZES = ((16, 24), (24, 16), (4, 4), (8, 40), (24, 16), (32, 32), (4, 60))


def images_of_sizes(*sizes: tuple[int, int], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes or SIZES]


def alone(m: AdaptiveTokenizer, x: list[Tensor], criteria: list[Any]) -> list[TokenSequence]:
    """Tokens of images that are encoded each in a list of its own."""
    return [m.encode([image], criterion) for image, criterion in zip(x, criteria, strict=True)]


@every_base
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottleneck": "continuous"},
        {"halting": "mask", "halting_threshold": 0.3},
        {"halting": "drop", "halting_threshold": 0.3},
    ],
    ids=str,
)
def test_batched_equals_single(base: str, options: dict[str, Any]) -> None:
    """Images of any size have the same tokens and pixels in a list, in a stream and alone."""
    if base == "vqgan" and "halting" in options:
        options = {**options, "halting_threshold": 0.06}
    m, x = model(base, **options), images_of_sizes()
    lengths = [3, 12, 6, 9, 3, 12, 6]
    single = alone(m, x, [FixedLength(n) for n in lengths])
    batch = m.encode(x, FixedLength(lengths))
    rows = 3 * (1 + 64 + 12)
    stream = list(m.encode_stream(iter(x), FixedLength(lengths), max_tokens_in_flight=rows))
    for found in (batch, TokenSequence.concatenate(stream)):
        assert found.lengths.tolist() == lengths
        assert found.sizes is not None and found.sizes.tolist() == [list(s) for s in SIZES]
        for b, one in enumerate(single):
            if one.indices is None:
                torch.testing.assert_close(found[b].rows, one.rows, rtol=1e-4, atol=1e-4)
            elif not torch.equal(found[b].rows, one.rows):
                raw = model(base, **options, quirks=Quirks(unquantized_tokens=True))
                latents = raw.encode([x[b]], FixedLength(lengths[b])).rows
                same_indices(m, found[b].rows, one.rows, latents)
    decoded = m.decode(batch)
    assert isinstance(decoded, list)
    for b, pixels in enumerate(decoded):
        assert pixels.shape == x[b].shape
        torch.testing.assert_close(pixels, m.decode(batch[b])[0], rtol=1e-4, atol=1e-4)


@every_base
@pytest.mark.parametrize("kind", [MaxL1, CodeError])
def test_criteria_see_images_of_any_size(base: str, kind: Any) -> None:
    m, x = model(base), images_of_sizes()
    with torch.no_grad():
        errors = [
            float(kind(0.0).error(iteration, m)[0])
            for image in x
            for iteration in m.rollout(
                image[None], places=m.places((image.shape[1] // 4, image.shape[2] // 4))
            )
        ]
    criterion = kind(sum(sorted(errors)[13:15]) / 2)
    found = m.encode(x, criterion)
    expected = TokenSequence.concatenate(alone(m, x, [criterion] * len(x)))
    assert torch.equal(found.lengths, expected.lengths)
    assert len(set(found.lengths.tolist())) > 1


@every_base
def test_images_of_the_models_size_are_as_in_a_batch(base: str) -> None:
    m, x = model(base), images()
    for criterion in (FixedLength(6), FixedLength([3, 6, 12]), MaxL1(0.3)):
        batch, listed = m.encode(x, criterion), m.encode(list(x), criterion)
        assert torch.equal(batch.rows, listed.rows) and torch.equal(batch.lengths, listed.lengths)
        assert batch.sizes.tolist() == listed.sizes.tolist() == [[16, 24]] * 3
        assert torch.equal(m.decode(batch), m.decode(listed))
        by_default = TokenSequence(batch.lengths, indices=batch.indices)
        assert torch.equal(m.decode(by_default), m.decode(batch))


@pytest.mark.parametrize("length_head", [False, True])
def test_lengths_in_one_pass_and_budgets_of_images_of_any_size(length_head: bool) -> None:
    """Predicted lengths equal those of each image alone; a budget is shared by the whole list."""
    m, x = model(length_head=length_head, any_length=True), images_of_sizes()
    if m.length_head is not None:
        m.length_head.image_count.fill_(10)
        with torch.no_grad():
            m.length_head.hidden.weight.normal_(generator=torch.Generator().manual_seed(0))
        found = m.encode(x, Predicted(max_l1=0.5))
        single = TokenSequence.concatenate(alone(m, x, [Predicted(max_l1=0.5)] * len(x)))
        assert torch.equal(found.lengths, single.lengths)
    spent = m.encode(x, Budget(7))
    assert int(spent.lengths.sum()) <= 7 * len(x) and spent.sizes.tolist() == [*map(list, SIZES)]
    same = images()
    batch, listed = m.encode(same, Budget(7)), m.encode(list(same), Budget(7))
    assert torch.equal(batch.rows, listed.rows) and torch.equal(batch.sizes, listed.sizes)
    found = m.encode(x, MaxL1(0.3))
    single = TokenSequence.concatenate(alone(m, x, [MaxL1(0.3)] * len(x)))
    assert torch.equal(found.lengths, single.lengths)


def test_one_run_of_the_encoder_for_all() -> None:
    m, x, runs = model(), images_of_sizes(), []
    m.encoder.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0].shape[:-1].numel()))
    m.encode(x, FixedLength(6))
    rows = sum(1 + size[0] * size[1] // 16 for size in SIZES)
    assert runs == [rows + 3 * 7, rows + 6 * 7]


def test_one_run_of_the_decoder_for_all() -> None:
    """The decoder runs once for all sizes, in predictions and in decoding."""
    m, x, runs = model(), images_of_sizes(), []
    m.decoder.ffn.register_forward_hook(lambda *_: runs.append(1))
    tokens = m.encode(x, MaxL1(0.0))
    assert len(runs) == 4
    m.decode(tokens)
    assert len(runs) == 5
    list(m.encode_stream(x, MaxL1(0.0), max_tokens_in_flight=10_000))
    assert len(runs) == 9
    m.encode(x, FixedLength(12))
    assert len(runs) == 9


def test_positions_are_looked_up_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, made = model(halting="mask", halting_threshold=0.3), images_of_sizes(*SIZES, *SIZES), []
    places = type(m).places
    monkeypatch.setattr(
        type(m), "places", lambda m, grid=None: made.append(grid) or places(m, grid)
    )
    m.encode(x, MaxL1(0.0))
    grids = {(height // 4, width // 4) for height, width in SIZES}
    assert sorted(made) == sorted(grids)
    made.clear()
    list(m.encode_stream(x, MaxL1(0.0), max_tokens_in_flight=200))
    assert sorted(made) == sorted(grids)


@pytest.mark.parametrize("own", [(4, 6), (8, 8), (16, 16)])
def test_every_place_has_a_learned_position_near_its_own(own: tuple[int, int]) -> None:
    """Positions on the model's own grid are unchanged; smaller grids use none twice."""
    count = own[0] * own[1]
    assert learned_place(own, own).tolist() == list(range(count))
    for grid in itertools.product((1, 2, 3, 5, 7, 9, 16, 30), repeat=2):
        found = learned_place(own, grid)
        assert len(found) == grid[0] * grid[1]
        assert len(found) > count or len(found.unique()) == len(found)
    for grid in ((own[0] + 1, own[1] - 1), (own[0] - 1, own[1] + 1), (2 * own[0], 2 * own[1])):
        found = learned_place(own, grid).view(grid)
        rows, columns = found // own[1], found % own[1]
        down = (torch.arange(grid[0]) + 0.5)[:, None] / grid[0] - (rows + 0.5) / own[0]
        across = (torch.arange(grid[1]) + 0.5) / grid[1] - (columns + 0.5) / own[1]
        assert down.abs().max() < 2 / own[0] and across.abs().max() < 2 / own[1]
        assert bool((columns.diff(dim=1) >= 0).all())


def test_positions_are_learned_ones() -> None:
    m = model()
    for learned, found in zip(m.places()[1:], m.places((3, 7))[1:], strict=True):
        assert torch.equal(found[0], learned[0])
        assert torch.equal(found[1:], learned[1:][learned_place((4, 6), (3, 7))])
    assert m.places((4, 6)).encoder_ND is m.encoder_positional_embedding


@pytest.mark.parametrize("halting", ["off", "mask", "drop"])
@torch.no_grad()
def test_a_rollout_on_another_grid(halting: str) -> None:
    """A rollout on another grid gives predictions and pixels of that grid."""
    m, x = (
        model("vqgan", halting=halting, halting_threshold=0.06),
        torch.stack(images_of_sizes((8, 12))),
    )
    for iteration in m.rollout(x, places=m.places((2, 3))):
        assert iteration.image_tokens_BND.shape[1] == 7
        assert m.pixels(iteration.prediction).shape == x.shape


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "images: expected at least one, got none"),
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 9)], r"images\[1\]: expected sides .* got 8 x 9"),
        ([torch.rand(3, 3, 8)], r"images\[0\]: expected sides of at least 4 pixels, .* got 3 x 8"),
        ([torch.rand(3, 0, 8)], r"images\[0\]: expected sides of at least 4 pixels"),
        ([torch.rand(3, 4, 1540)], r"images\[0\]: expected at most 384 patches .* with 385"),
        ([torch.rand(3, 8, 8), torch.rand(1, 3, 8, 8)], r"images\[1\]: expected shape \(3, height"),
        ([torch.rand(4, 8, 8)], r"images\[0\]: expected shape \(3, height, width\), got \(4, 8, 8"),
        ([torch.rand(3, 8, 8), torch.ones(3, 8, 8).byte()], r"images\[1\]: .* torch.uint8; divide"),
        (
            [torch.rand(3, 8, 8), "x.jpg"],
            r"images\[1\]: expected a floating-point tensor .* got str",
        ),
        ([torch.rand(3, 8, 8).double()], r"images\[0\]: expected dtype torch.float32 like the m"),
        ([torch.rand(3, 8, 8) + 1], r"images\[0\]: expected values in \[0, 1\], got 1"),
        ([torch.rand(3, 8, 8, device="meta")], r"images\[0\]: expected device cpu like the model"),
        (
            torch.rand(2, 3, 8, 8),
            r"expected shape \(B, 3, 16, 24\), .*; a list of images may be of",
        ),
        (5, "images: expected a floating-point tensor .* got int"),
    ],
    ids=range(14),
)
def test_wrong_images(x: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model().encode(x, FixedLength(3))


def test_what_lists_cannot_have() -> None:
    m, x = model(), images_of_sizes()
    base = m.rollout(images()).base
    with pytest.raises(ValueError, match="base: expected None with a list of images"):
        m.encode(x, FixedLength(3), base=base)
    with pytest.raises(ValueError, match=r"images: the published rule .* takes those"):
        model(quirks=Quirks.official()).encode(x, MaxL1(0.1))
    with pytest.raises(ValueError, match=r"one length per image \(7\), got 2"):
        m.encode(x, FixedLength([3, 6]))


def sequence(sizes: Any) -> TokenSequence:
    return TokenSequence(torch.tensor([2, 1]), indices=torch.tensor([1, 2, 3]), sizes=sizes)


def test_sizes_stay_with_their_images() -> None:
    tokens = sequence(torch.tensor([[8, 12], [16, 4]]))
    assert tokens[0].sizes.tolist() == [[8, 12]] and tokens[-1].sizes.tolist() == [[16, 4]]
    joined = TokenSequence.concatenate([tokens[1], tokens, tokens[0]])
    assert joined.sizes.tolist() == [[16, 4], [8, 12], [16, 4], [8, 12]]
    assert tokens.to("cpu").sizes.tolist() == tokens.sizes.tolist()
    assert tokens.truncated(1).sizes.tolist() == tokens.sizes.tolist()
    assert sequence(None)[0].sizes is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sequence(torch.ones(2, 3).long()),
            r"sizes: expected \(2, 2\) int64, got \(2, 3\)",
        ),
        (
            lambda: sequence(torch.ones(1, 2).long()),
            r"sizes: expected \(2, 2\) int64, got \(1, 2\)",
        ),
        (lambda: sequence(torch.ones(2, 2)), r"sizes: expected \(2, 2\) int64, .* torch.float32"),
        (lambda: sequence(torch.zeros(2, 2).long()), "sizes: expected at least 1, got 0"),
        (lambda: sequence(torch.ones(2, 2, device="meta").long()), "sizes: expected them on the C"),
        (
            lambda: TokenSequence.concatenate([sequence(None), sequence(torch.ones(2, 2).long())]),
            "sequences: expected all with sizes or none, got 1 of 2 with",
        ),
        (
            lambda: model().decode(sequence(torch.tensor([[8, 8], [8, 10]]))),
            r"tokens.sizes\[1\]: expected sides of at least 4 pixels, .* got 8 x 10",
        ),
        (
            lambda: model().decode(sequence(torch.tensor([[8, 8], [2**40, 2**40]]))),
            r"tokens.sizes\[1\]: expected at most 384 patches",
        ),
    ],
    ids=range(8),
)
def test_wrong_sizes(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
