"""Rollout, encode and decode of small models: every base and variant, whole batches and single images."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    AllOf,
    CodeError,
    FixedLength,
    MaxL1,
    Quirks,
    TokenAccuracy,
    TokenSequence,
    stage1_loss,
)
from tests.helpers.models import BASES, VARIANTS, images, model, same_indices

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_base = pytest.mark.parametrize("base", BASES)


@every_base
@every_variant
def test_batched_rollout_equals_single(base: str, variant: str) -> None:
    m, x = model(base, bottleneck=variant, halting="mask"), images()
    with torch.no_grad():
        whole = list(m.rollout(x))
        assert [iteration.num_tokens for iteration in whole] == [3, 6, 9, 12]
        for b in range(len(x)):
            for a, s in zip(whole, m.rollout(x[b : b + 1]), strict=True):
                torch.testing.assert_close(a.latents_BLD[b], s.latents_BLD[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    a.prediction.decoded_BNV[b], s.prediction.decoded_BNV[0], rtol=1e-4, atol=1e-4
                )
                if variant == "quantized":
                    found, alone = (x.bottleneck.quantized.index for x in (a, s))
                    same_indices(m, found[b], alone[0], a.bottleneck.continuous_BLC[b])


@every_base
@every_variant
def test_batched_encode_and_decode_equal_single(base: str, variant: str) -> None:
    m, x = model(base, bottleneck=variant), images()
    tokens = m.encode(x, FixedLength([6, 12, 3]))
    assert tokens.lengths.tolist() == [6, 12, 3]
    pixels = m.decode(tokens)
    assert pixels.shape == x.shape
    for b in range(len(x)):
        single = m.encode(x[b : b + 1], FixedLength(int(tokens.lengths[b])))
        torch.testing.assert_close(single.rows, tokens[b].rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m.decode(single)[0], pixels[b], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m.decode(tokens[b])[0], pixels[b], rtol=1e-4, atol=1e-4)


@every_base
@every_variant
def test_decode_of_tokens_is_the_rollout_prediction(base: str, variant: str) -> None:
    m, x = model(base, bottleneck=variant), images()
    with torch.no_grad():
        for iteration in m.rollout(x):
            expected = m.pixels(iteration.prediction)
            actual = m.decode(m.encode(x, FixedLength(iteration.num_tokens)))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "kind"),
    [*((base, kind) for base in BASES for kind in (MaxL1, CodeError)), ("vqgan", TokenAccuracy)],
)
def test_criteria_are_per_image(base: str, kind: Any) -> None:
    """Every image stops at the first iteration where its own error is below, or its accuracy at, the threshold."""
    m, x = model(base), images(6)
    with torch.no_grad():
        iterations = list(m.rollout(x))
    if kind is TokenAccuracy:
        hits = [i.prediction.decoded_BNV.argmax(-1) == i.base.target_BN for i in iterations]
        values = torch.stack([hit.float().mean(1) for hit in hits])
        threshold = float(values[0].median())
        good = values >= threshold
    else:
        values = torch.stack([kind(0.0).error(iteration, m) for iteration in iterations])
        threshold = float(values.flatten().sort().values[11:13].mean())
        good = values < threshold
    error = 1 - values if kind is TokenAccuracy else values
    # If no iteration is good enough, the first within 1 % of the best is kept.
    good |= ~good.any(0) & (error <= 1.01 * error.amin(0))
    expected = (3 * (1 + good.int().argmax(0))).tolist()
    assert m.encode(x, kind(threshold)).lengths.tolist() == expected
    assert len(set(expected)) > 1


def test_finished_images_leave_the_batch() -> None:
    m, x = model(), images(4)
    sizes = []
    m.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:2]))
    m.encode(x, FixedLength([3, 9, 3, 6]))
    assert sizes == [(4, 28), (2, 31), (1, 34)]


@pytest.mark.parametrize("halting", ["off", "mask"])
@pytest.mark.parametrize("at", [None, (), [2], {1, 3}])
def test_predict_at_says_where_predictions_and_gradients_are(
    at: Collection[int] | None, halting: str
) -> None:
    m, calls = model(bottleneck="continuous", halting=halting), []
    m.decoder.ffn.register_forward_hook(lambda *_: calls.append(1))
    found = list(m.rollout(images(), predict_at=at, through_time=False))
    expected = [at is None or index in at for index in range(4)]
    assert [i.prediction is not None for i in found] == expected
    assert [i.latents_BLD.requires_grad for i in found] == expected
    assert len(calls) == (sum(expected) if halting == "off" else 3 + expected[3])


def test_evaluation_is_deterministic_and_generators_are_obeyed() -> None:
    m, x = model("vae", halting="mask"), images()
    first, second = (m.encode(x, FixedLength(12)).indices for _ in range(2))
    assert torch.equal(first, second)
    seeded = [
        next(m.rollout(x, generator=torch.Generator().manual_seed(seed))).base.tokens_BCHW
        for seed in (5, 5, 6)
    ]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("quirks", [Quirks(), Quirks(halt_only_at_predicted_iterations=True)])
def test_halting_does_not_depend_on_the_criterion(quirks: Quirks) -> None:
    """A criterion that needs no prediction gives the tokens that any other gives at that length."""
    m, x = model("vqgan", halting="mask", halting_threshold=0.06, quirks=quirks), images()
    fixed, by_error = m.encode(x, FixedLength(12)), m.encode(x, AllOf(MaxL1(9.0), FixedLength(12)))
    assert torch.equal(fixed.rows, by_error.rows)
    off = model("vqgan", quirks=quirks).encode(x, FixedLength(12))
    assert not torch.equal(off.rows, fixed.rows)


def test_decoding_never_trains() -> None:
    m = model(ema_decay=0.9, quirks=Quirks(unquantized_tokens=True)).train()
    before = {name: value.clone() for name, value in m.state_dict().items()}
    m.decode(m.encode(images(), FixedLength([3, 6, 12])))
    assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items())


def test_halting_masks_tokens() -> None:
    m, x = model("vqgan", halting="mask", halting_threshold=0.06), images()
    with torch.no_grad():
        rollout = m.rollout(x)
        first = next(rollout)
        assert torch.equal(first.halted, first.prediction.p_target_BN >= 0.06)
        assert first.halted.any() and not first.halted.all()
        kept = m.next_input(first.image_tokens_BND, first.latents_BLD, None, 1)
        changed = (kept != rollout.tokens_BSD).any(-1)[:, 1:25]
        assert torch.equal(changed, first.halted)


@pytest.mark.parametrize("halting", ["off", "mask", "drop"])
@every_base
@every_variant
def test_gradients_reach_every_parameter(base: str, variant: str, halting: str) -> None:
    m = model(
        base,
        bottleneck=variant,
        halting=halting,
        halting_threshold=0.06 if base == "vqgan" else 0.5,
    ).train()
    m.base_tokenizer.requires_grad_(False)
    stage1_loss(m, images(), generator=torch.Generator().manual_seed(0)).total.backward()
    unused = {name for name, p in m.named_parameters() if p.requires_grad and p.grad is None}
    expected = set() if halting == "mask" else {"encoder_mask_token"}
    if variant == "unfactorized":
        expected |= {"pre_quantizer_mlp.weight", "pre_quantizer_mlp.bias"}
    assert unused == expected
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


def test_nano_size() -> None:
    m = AdaptiveTokenizer.from_size("nano", base="dct")
    assert 1.5e6 <= sum(p.numel() for p in m.parameters()) <= 8e6


class Always:
    """Criterion with the same answer at every iteration."""

    needs_prediction = False

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __call__(self, iteration: object, m: object) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.rollout(images()[..., :16]),
            r"images: expected shape \(B, 3, 16, 24\), got \(",
        ),
        (lambda m: m.rollout(images()[0]), "images: expected shape"),
        (lambda m: m.rollout(images().byte()), "images: expected a floating-point tensor"),
        (lambda m: m.rollout("x.jpg"), "images: expected a floating-point tensor in .*, got str"),
        (lambda m: m.rollout(images() + 254), r"images: expected values in \[0, 1\], got 254"),
        (lambda m: m.rollout(images() * torch.nan), r"images: expected values in \[0, 1\]"),
        (lambda m: m.rollout(images().double()), "images: expected dtype torch.float32 like the m"),
        (lambda m: m.rollout(images(0)), "images: expected at least one"),
        (
            lambda m: m.rollout(images(), predict_at=[4]),
            r"predict_at: expected iterations in 0\.\.3",
        ),
        (lambda m: m.encode(images(), FixedLength(0)), "tokens: expected 1 to 12, got 0"),
        (lambda m: m.encode(images(), FixedLength([3, 13, 3])), "tokens: expected 1 to 12, got 13"),
        (lambda m: m.encode(images(), FixedLength([3, 6])), r"one length per image \(3\), got 2"),
        (lambda m: m.encode(images(), FixedLength(2.5)), "tokens: expected an integer"),
        (
            lambda m: m.encode(images(), Always(torch.tensor(True))),
            r"criterion: expected Always to give \(3,\) bool, got \(\) torch.bool",
        ),
        (
            lambda m: m.encode(images(), Always([True] * 3)),
            r"criterion: expected Always to give \(3,\) bool, got list",
        ),
        (lambda m: m.encode(images(), 0.05), r"criterion: expected FixedLength, .* got float"),
        (lambda m: m.encode(images(), len), "with a bool attribute needs_prediction, got builtin"),
        (lambda m: m.encode(images(), MaxL1("a")), "threshold: expected a number, got str"),
        (lambda m: m.decode(torch.zeros(2, 3)), "tokens: expected a TokenSequence, got Tensor"),
        (lambda m: m.decode(indices(0, 32)), r"tokens: expected indices in 0\.\.31, got 0\.\.32"),
        (lambda m: m.decode(indices(-1, 3)), r"tokens: expected indices in 0\.\.31, got -1\.\.3"),
        (lambda m: m.decode(indices(*[0] * 13)), "tokens: expected at most 12 per image, got 13"),
        (lambda m: m.decode(NOTHING), "tokens: expected at least one sequence"),
    ],
    ids=range(23),
)
def test_wrong_arguments(call: Callable[[AdaptiveTokenizer], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(model())


def indices(*values: int) -> TokenSequence:
    return TokenSequence(torch.tensor([len(values)]), indices=torch.tensor(values))


NOTHING = TokenSequence(torch.tensor([], dtype=torch.int64), indices=torch.tensor([]).long())


@pytest.mark.parametrize(
    ("variant", "tokens", "message"),
    [
        ("continuous", indices(0), "tokens: expected latents, the model is continuous, got ind"),
        ("continuous", torch.zeros(1, 5), "tokens: expected latents of 6 channels, got 5"),
        ("continuous", torch.full((1, 6), torch.nan), "tokens: expected finite latents"),
        ("unfactorized", torch.zeros(1, 6), "tokens: expected latents of 32 channels, got 6"),
    ],
    ids=range(4),
)
def test_wrong_latents(variant: str, tokens: TokenSequence | Tensor, message: str) -> None:
    if isinstance(tokens, Tensor):
        tokens = TokenSequence(torch.tensor([1]), latents=tokens)
    with pytest.raises(ValueError, match=message):
        model(bottleneck=variant).decode(tokens)


def test_sequence() -> None:
    values = torch.tensor([0, 1, 8, 9, 10, 11])
    tokens = TokenSequence(torch.tensor([2, 0, 4]), indices=values)
    assert tokens.offsets.tolist() == [0, 2, 2, 6]
    assert tokens.padded(-1).tolist() == [[0, 1, -1, -1], [-1] * 4, [8, 9, 10, 11]]
    assert len(tokens) == 3 and tokens[-1].rows.tolist() == [8, 9, 10, 11]
    joined = TokenSequence.concatenate([tokens[b] for b in range(3)])
    assert torch.equal(joined.rows, tokens.rows) and torch.equal(joined.lengths, tokens.lengths)
    one, none = torch.tensor([1]), torch.tensor([]).long()
    for build, message in (
        (lambda: tokens[3], "image: expected an index into 3 sequences, got 3"),
        (lambda: TokenSequence(one), "either indices or latents"),
        (lambda: TokenSequence(one, indices=torch.tensor([1, 2])), "lengths: expected a sum of 2"),
        (lambda: TokenSequence(-one, indices=none), "lengths: expected at least 0"),
        (lambda: TokenSequence(one, indices=one.float()), "indices: expected"),
        (lambda: TokenSequence(one, latents=one.float()), "latents: expected"),
        (lambda: TokenSequence(one.int(), indices=one), "lengths: expected"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=message):
            build()


@pytest.mark.parametrize("halting", ["off", "mask", "drop"])
def test_truncated_backpropagation_stays_within_an_iteration(halting: str) -> None:
    """Truncated backpropagation has gradients within one iteration only, and changes no value."""
    m, x = model("dct", bottleneck="continuous", halting=halting), images()

    def gradients(at: list[int], *, through_time: bool, restart: bool) -> dict[str, Tensor]:
        """Gradients of the sum of the predictions; ``restart``: truncated by hand, from a state without gradients."""
        m.zero_grad()
        rollout = m.rollout(x, predict_at=at, through_time=through_time)
        for iteration in rollout:
            if iteration.index in at:
                iteration.prediction.code_BNC.sum().backward(retain_graph=True)
            elif not through_time:
                assert not iteration.latents_BLD.requires_grad
            if restart and iteration.index < 3:
                state = {
                    n: getattr(iteration, n).detach() for n in ("image_tokens_BND", "latents_BLD")
                }
                rollout._prepare(replace(iteration, **state))
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    with torch.no_grad():
        values = list(m.rollout(x, through_time=False))
    for a, b in zip(m.rollout(x), values, strict=True):
        assert torch.equal(a.latents_BLD, b.latents_BLD) and not b.latents_BLD.requires_grad
    for at in ([0], [2], [1, 3]):
        by_hand = gradients(at, through_time=True, restart=True)
        truncated = gradients(at, through_time=False, restart=False)
        whole = gradients(at, through_time=True, restart=False)
        assert truncated.keys() <= whole.keys()
        for name, gradient in truncated.items():
            torch.testing.assert_close(gradient, by_hand[name], msg=name)
        differs = not torch.allclose(truncated["latent_tokens"], whole["latent_tokens"])
        assert differs == (at != [0])


def test_thresholds_may_be_of_numpy() -> None:
    assert MaxL1(np.float32(0.5)).threshold == 0.5


def test_a_model_can_be_pickled() -> None:
    m = model()
    copied = pickle.loads(pickle.dumps(m))
    x = images()
    assert torch.equal(copied.encode(x, FixedLength(3)).rows, m.encode(x, FixedLength(3)).rows)
