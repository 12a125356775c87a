"""Generators: samples drawn together equal those drawn alone, with a cache or without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alit import AdaptiveTokenizer, CheckpointError, TokenSequence
from alit.generation import Generator, sample
from alit.generation.autoregressive import Cache, next_token
from alit.generation.drawing import Sharpness, chance, draw
from alit.generation.masked import guesses
from alit.generation.model import Packed
from alit.training.generator_stage import GeneratorModule
from tests.helpers.models import model
from tests.helpers.tokens import generator, sequences

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(tokens: TokenSequence, labels: list[int]) -> Tensor:
    padded = torch.full((len(tokens), 12), -1)
    for row, one in zip(padded, tokens.rows.split(tokens.lengths.tolist()), strict=True):
        row[: len(one)] = one
    return torch.cat([torch.tensor(labels)[:, None], padded], 1)


def next_logits(g: Generator, label: int, tokens: Tensor) -> Tensor:
    """Logits (K + 1,) after these tokens, from the whole sequence without a cache."""
    rows = g.packed(torch.tensor([label]), tokens[None], torch.tensor([len(tokens)]))
    ((_, logits),) = g.scored(g.whole(rows)[-1:], rows.position_T[-1:])
    return logits[0]


@torch.no_grad()
def test_cached_and_packed_is_recomputed_alone() -> None:
    """Every token is the same draw from the same logits, whichever samples are in flight beside it."""
    g = generator(("a", "b"))
    one, some, all_ = (sample(g, 20, in_flight=n, seed=7) for n in (1, 4, 64))
    assert one.labels == some.labels == all_.labels and set(one.labels) == {0, 1}
    assert torch.equal(one.tokens.rows, some.tokens.rows)
    assert torch.equal(one.tokens.rows, all_.tokens.rows)
    lengths = one.tokens.lengths.tolist()
    assert lengths == all_.tokens.lengths.tolist() and len(set(lengths)) > 4, lengths
    parts = one.tokens.rows.split(lengths)
    for number, (label, tokens) in enumerate(zip(one.labels, parts, strict=True)):
        random = chance(7, number)
        torch.ones(2, dtype=torch.float64).multinomial(1, generator=random)  # the class
        uniform = torch.rand(12, generator=random)
        for place in range(min(12, len(tokens) + 1)):
            logits = next_logits(g, label, tokens[:place])
            logits[32] = -torch.inf if place == 0 else logits[32]
            token, _ = draw(logits[None], uniform[place : place + 1], Sharpness())
            assert int(token) == (int(tokens[place]) if place < len(tokens) else 32)


@torch.no_grad()
def test_cache_gives_the_logits_of_whole_sequences() -> None:
    """A cache gives the logits of whole sequences, at different tokens and in places that others have used."""
    g = generator()
    cache, tokens = Cache(g, 4), sequences(3).rows[:9].view(3, 3)
    places, starts = torch.tensor([0, 2, 3]), [0, 1, 2]
    for keys in (*cache.keys, *cache.values):
        keys.fill_(1e3)
    for step in range(3):  # sequence b has step - starts[b] tokens
        running = torch.tensor([b for b in range(3) if step >= starts[b]])
        position = torch.tensor([step - starts[b] for b in running.tolist()])
        last = tokens[running, (position - 1).clamp(min=0)]
        slot = torch.where(
            position == 0,
            g.class_slot(position * 0),
            g.code_slot(last, (position - 1).clamp(min=0)),
        )
        x = g(slot, position, None, cache.attend(places[running], position))
        for b, n, row in zip(running.tolist(), position.tolist(), x, strict=True):
            rows = g.packed(torch.zeros(1).long(), tokens[b : b + 1, :n], torch.tensor([n]))
            torch.testing.assert_close(row, g.whole(rows)[-1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_what_has_ended_leaves(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended sequences leave the batch: no row is computed for them, and others take their places."""
    g, counts = generator(causal=causal), []
    forward = Generator.forward

    def counting(self: Generator, slot_T: Tensor, *rest: Any) -> Tensor:
        counts.append(len(slot_T))
        return forward(self, slot_T, *rest)

    monkeypatch.setattr(Generator, "forward", counting)
    lengths = sample(g, 20, in_flight=8, steps=6).tokens.lengths
    if causal:
        # A row for each token and one for the end, which the longest do not need.
        assert sum(counts) == int((lengths + 1).clamp(max=12).sum())
        assert counts[:2] == [8, 8] and max(counts) == 8 and counts[-1] < 8
    else:
        # Images of n tokens are computed in at most n steps.
        some = lengths.split(8)
        expected = [int((x[x >= step] + 1).sum()) for x in some for step in range(1, 7)]
        assert counts == [x for x in expected if x] and min(lengths.tolist()) < 6


@torch.no_grad()
def test_masked_samples() -> None:
    """Masked samples have the data's lengths, do not depend on others in flight, and hold no mask token."""
    g = generator(("a", "b"), causal=False)
    g.lengths[0, 8:], g.lengths[1, :8] = 0, 0
    one, all_ = sample(g, 60, in_flight=5), sample(g, 60)
    assert torch.equal(one.tokens.rows, all_.tokens.rows)
    assert int(all_.tokens.rows.max()) < 32
    lengths = all_.tokens.lengths
    assert all((x >= 8) == label for x, label in zip(lengths.tolist(), all_.labels, strict=True))
    of_b = sample(g, 300, of="b", seed=1).tokens.lengths
    share = torch.bincount(of_b, minlength=13)[8:] / 300
    torch.testing.assert_close(share, g.lengths[1, 8:] / g.lengths[1].sum(), atol=0.08, rtol=0)


@torch.no_grad()
def test_masked_tokens_are_guessed_from_all_others() -> None:
    """Guesses of masked tokens depend on all known tokens of their own sequence, later ones too, and on no others."""
    g = generator(causal=False)
    tokens = torch.tensor([[5, 32, 7, 1], [32, 2, 0, 0]])
    uniform, lengths, labels = torch.tensor([0.4, 0.8]), torch.tensor([4, 2]), torch.zeros(2).long()
    both, probability = guesses(g, labels, tokens, lengths, uniform, Sharpness())
    first, its = guesses(g, labels[:1], tokens[:1], lengths[:1], uniform[:1], Sharpness())
    assert both[0] == first[0]
    torch.testing.assert_close(probability[:1], its, rtol=1e-4, atol=0)
    tokens[0, 3] = 30
    _, other = guesses(g, labels[:1], tokens[:1], lengths[:1], uniform[:1], Sharpness())
    assert not torch.allclose(its, other, rtol=1e-2)


@torch.no_grad()
def test_no_row_attends_to_masked_ones() -> None:
    """Known rows come first and do not depend on masked ones; a masked row does not depend on the other masked ones."""
    g = generator(causal=False)
    tokens = torch.tensor([[32, 5, 32, 7, 32, 1], [4, 32, 32, 9, 0, 0]])
    rows = g.packed(torch.zeros(2).long(), tokens, torch.tensor([6, 4]))
    assert rows.position_T.tolist() == [0, 2, 4, 6, 1, 3, 5, 0, 1, 4, 2, 3]
    assert rows.stop_T.tolist() == [4] * 7 + [3] * 5
    assert rows.masked_T.nonzero()[:, 0].tolist() == [4, 5, 6, 10, 11]
    expected = g.whole(rows)
    fields = rows.slot_T, rows.position_T, rows.length_T, rows.stop_T, rows.masked_T
    for first, known, count in ((0, 4, 7), (7, 3, 5)):
        for row in range(first + known, first + count):
            kept = [*range(first, first + known), row]
            offsets = torch.tensor([0, len(kept)], dtype=torch.int32)
            alone = Packed(*(x[kept] for x in fields), offsets, len(kept))
            torch.testing.assert_close(g.whole(alone), expected[kept], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_causal_loss_is_that_of_each_sequence() -> None:
    """The causal loss is the mean over tokens and ends, as computed from each prefix alone."""
    g, tokens, labels = generator(("a", "b")), sequences(6, seed=5), [0, 1, 1, 0, 1, 0]
    assert 12 in tokens.lengths, "one that needs no end"
    expected = []
    for label, part in zip(labels, tokens.rows.split(tokens.lengths.tolist()), strict=True):
        for place in range(min(12, len(part) + 1)):
            target = part[place] if place < len(part) else torch.tensor(32)
            expected.append(cross_entropy(next_logits(g, label, part[:place]), target))
    loss, _ = GeneratorModule(g)(rows_of(tokens, labels))
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_draws() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    token, probability = draw(logits, uniform, Sharpness())
    expected = logits[0].softmax(0)
    torch.testing.assert_close(token.bincount(minlength=4) / 20_000, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(probability, expected[token].double())
    hot, _ = draw(logits, uniform, Sharpness(temperature=2.0))
    share = hot.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), atol=0.01, rtol=0)
    two, _ = draw(logits, uniform, Sharpness(top_k=2))
    assert set(two.tolist()) == {1, 3}
    # The likeliest token has probability 0.665, the first two together 0.91.
    for top_p, tokens in ((0.6, {3}), (0.7, {1, 3}), (0.92, {0, 1, 3})):
        assert set(draw(logits, uniform, Sharpness(top_p=top_p))[0].tolist()) == tokens
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits[:2], ends, Sharpness())[0].tolist() == [0, 3]
    last = torch.tensor([[0.0, -torch.inf]])
    assert draw(last, ends[1:], Sharpness())[0].tolist() == [0]


@torch.no_grad()
def test_no_sequence_is_empty() -> None:
    g = generator()
    g.embedding.weight[32] += 100 * g.embedding.weight[32].sign()
    x, first = torch.randn(50, 32), torch.zeros(50).long()
    assert int(next_token(g, x, first, torch.rand(50), Sharpness()).max()) < 32


@pytest.mark.parametrize("causal", [True, False])
def test_files(causal: bool, tmp_path: Path) -> None:
    g, path = generator(("rose", "tulip"), causal=causal), tmp_path / "g.safetensors"
    g.save_pretrained(path)
    again = Generator.from_pretrained(path)
    assert again.config == g.config and not again.training
    assert torch.equal(sample(again, 5).tokens.rows, sample(g, 5).tokens.rows)
    with pytest.raises(CheckpointError, match="format 'alit-1' in the metadata, got 'alit-gen"):
        AdaptiveTokenizer.from_pretrained(path)
    model().save_pretrained(path)
    with pytest.raises(CheckpointError, match="format 'alit-generator-1' in the metadata, got"):
        Generator.from_pretrained(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 64}, r"shape \(3, 13\)|embedding.weight has shape"),
        ({"layers": 3}, "missing blocks.2"),
        ({"layers": 10**9}, r"layers: expected an integer in \[1, 128\]"),
        ({"max_tokens": 2**40}, "max_tokens: expected an integer"),
        ({"classes": ["a", "a"]}, "classes: expected different names"),
        ({"classes": [1, 2]}, "classes: expected a text, got 1"),
        ({"classes": "ab"}, "classes: expected a list of texts"),
        ({"fingerprint": "0" * 31}, "fingerprint: expected 32 hexadecimal digits"),
        ({"image_size": [16]}, "image_size: expected height and width"),
        ({"causal": "no"}, "causal: expected true or false"),
        ({"heads": 5}, "heads: expected a divisor"),
        ({"depth": 3}, "depth: no such field"),
    ],
)
def test_files_of_something_else(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    g, path = generator(), tmp_path / "g.safetensors"
    g.save_pretrained(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = header["__metadata__"]
    about["config"] = json.dumps({**json.loads(about["config"]), **fields})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(CheckpointError, match=message):
        Generator.from_pretrained(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: expected an integer in"),
        ({"count": True}, "count: expected an integer in"),
        ({"seed": -1}, "seed: expected an integer in"),
        ({"temperature": 0.0}, "temperature: expected a number in"),
        ({"temperature": float("nan")}, "temperature: expected a number in"),
        ({"top_k": 0}, "top_k: expected an integer in"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"top_p": float("nan")}, "top_p: expected a number"),
        ({"steps": 0}, "steps: expected an integer in"),
        ({"in_flight": 0}, "in_flight: expected an integer in"),
        ({"of": "rosse"}, "class: expected one of rose, tulip, got 'rosse'; did you mean 'rose'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(generator(("rose", "tulip")), **{"count": 2, **options})


def test_untrained_and_unconditional() -> None:
    for causal, classes in ((False, ()), (True, ("a", "b"))):
        g = generator(classes, causal=causal)
        g.lengths.zero_()
        with pytest.raises(ValueError, match="generator: expected a trained one"):
            sample(g, 1)
    with pytest.raises(ValueError, match="class: expected none, the generator has no classes"):
        sample(generator(), 1, of="rose")
