"""Latents and codes as features, at any length, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer, Features, FixedLength
from alit.features import features_at
from tests.helpers.models import BASES, VARIANTS, images, model

#: Tokens of one iteration and of all; see ``tests.helpers.models``.
STEP, LONGEST = 3, 12
RESIDUAL: dict[str, Any] = {"recurrence": "residual", "codebooks": "each"}
OPTIONS: list[dict[str, Any]] = [
    {},
    RESIDUAL,
    {"codebooks": "each"},
    {"halting": "mask", "halting_threshold": 0.3},
    {"halting": "drop", "halting_threshold": 0.3},
]
both_recurrences = pytest.mark.parametrize("options", OPTIONS[:2], ids=["latents", "residual"])


def any_length(**options: Any) -> AdaptiveTokenizer:
    return model(any_length=True, **options)


def close(found: Features, expected: Features) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5, 9, 12])
def test_they_are_what_encode_gives(options: dict[str, Any], tokens: int) -> None:
    m, x = any_length(**options), images()
    found, encoded = m.features(x, tokens=tokens), m.encode(x, FixedLength(tokens))
    assert encoded.indices is not None and found.index_BL is not None
    assert torch.equal(found.index_BL, encoded.padded().long())
    torch.testing.assert_close(found.codes_BLC, m.codes(found.index_BL))
    assert found.tokens_BLD.shape == (3, tokens, 32) and found.codes_BLC.shape == (3, tokens, 6)
    assert found.tokens_BLD.dtype == found.codes_BLC.dtype == torch.float32
    assert torch.equal(found.pooled_BD, found.tokens_BLD.mean(1))
    assert torch.equal(found.pooled_codes_BC, found.codes_BLC.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bottleneck", VARIANTS)
def test_latents_are_what_is_quantized(base: str, bottleneck: str) -> None:
    """The layer before the quantizer maps the features to the rollout's continuous latents."""
    m, x = model(base, bottleneck=bottleneck), images()
    found = m.features(x, tokens=6)
    _, step, *_ = m.rollout(x)
    projected = found.tokens_BLD
    if bottleneck != "unfactorized":
        projected = m.pre_quantizer_mlp(projected)
    torch.testing.assert_close(projected, step.bottleneck.continuous_BLC)
    torch.testing.assert_close(found.codes_BLC, step.bottleneck.codes_BLC)
    assert (found.index_BL is None) == (bottleneck != "quantized")
    assert found.codes_BLC.shape[2] == (32 if bottleneck == "unfactorized" else 6)


@torch.no_grad()
def test_tokens_of_all_iterations_where_they_are_final() -> None:
    m, x = any_length(**RESIDUAL), images()
    longest = m.features(x, tokens=LONGEST)
    seen = torch.cat([m.encoder_ln_post(step.latents_BLD) for step in m.rollout(x)], dim=1)
    torch.testing.assert_close(longest.tokens_BLD, seen)
    for tokens in range(1, LONGEST):
        close(m.features(x, tokens=tokens), Features(*(x[:, :tokens] for x in longest)))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_lengths_in_one_pass(options: dict[str, Any]) -> None:
    m, x = any_length(**options), images()
    lengths = [7, 3, 12, 4]
    for tokens, found in zip(lengths, features_at(m, x, lengths), strict=True):
        close(found, m.features(x, tokens=tokens))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_batched_equals_single(options: dict[str, Any]) -> None:
    """Features of a batch, or of a list of several sizes, equal those of single images, in order."""
    m = any_length(**options)
    sizes = ((16, 24), (8, 40), (16, 24), (4, 4), (8, 40))
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    for given in (images, images[:1], torch.stack(images[::2][:2])):
        found = m.features(given, tokens=5)
        alone = [m.features([image], tokens=5) for image in given]
        close(found, Features(*map(torch.cat, zip(*alone, strict=True))))


@both_recurrences
@pytest.mark.parametrize("sizes", [[(16, 24)] * 2, [(16, 24), (8, 8)]], ids=["batch", "list"])
def test_gradients(options: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    """Latents and codes have gradients to the images; with final tokens, only within their own iteration."""
    m = any_length(**options)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator).requires_grad_() for size in sizes]
    given = torch.stack(images) if sizes[0] == sizes[1] else images
    for name in ("tokens_BLD", "codes_BLC"):
        for place in (0, LONGEST - 1):
            part: Tensor = getattr(m.features(given, tokens=LONGEST), name)[:, place]
            found = torch.autograd.grad(part.square().sum(), [m.latent_tokens, *images])
            assert all(bool(grad.isfinite().all()) for grad in found)
            reached = [bool(grad.norm() > 0) for grad in found]
            assert reached == [True] + [not options or place == 0] * 2


@both_recurrences
def test_they_can_be_tuned(options: dict[str, Any]) -> None:
    """Gradient steps bring pooled features nearer to a target."""
    m, x = any_length(**options), images()
    target = m.features(images(seed=2), tokens=7).pooled_BD.detach()
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-3)
    errors = []
    for _ in range(8):
        error = (m.features(x, tokens=7).pooled_BD - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.7 * errors[0]


def test_no_gradients_where_the_caller_wants_none() -> None:
    for options in OPTIONS[:2]:
        m = any_length(**options)
        assert m.features(images(), tokens=5).tokens_BLD.requires_grad
        with torch.no_grad():
            found = m.features(images(), tokens=5)
        assert not found.tokens_BLD.requires_grad and not found.codes_BLC.requires_grad


@pytest.mark.parametrize("tokens", [0, -3, 13, 3.0, "3", True, None])
def test_other_lengths_are_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected an integer in \[1, 12\], got"):
        any_length().features(images(), tokens=tokens)


def test_whole_iterations_alone() -> None:
    m = model()
    with pytest.raises(ValueError, match="tokens: expected a multiple of 3, whole iterations"):
        m.features(images(), tokens=4)
    assert m.features(images(), tokens=6).tokens_BLD.shape[1] == 6


@pytest.mark.parametrize(
    "given, error, message",
    [
        (None, TypeError, "images: expected a floating-point tensor or a list"),
        ([], ValueError, "images: expected at least one, got none"),
        (torch.zeros(1, 3, 16, 16), ValueError, r"images: expected shape \(B, 3, 16, 24\)"),
        (torch.full((1, 3, 16, 24), 2.0), ValueError, r"images: expected values in \[0, 1\]"),
        ([torch.zeros(3, 16, 24), torch.zeros(3, 15, 24)], ValueError, r"images\[1\]: expected"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.uint8), TypeError, "divide 8-bit images by 255"),
    ],
    ids=range(6),
)
def test_other_images_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model().features(given, tokens=3)
