"""Codebooks for each iteration: indices by position, losses, moving averages, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alit import AdaptiveTokenizer, CodeError, DCTConfig, FixedLength, TokenSequence
from alit.checks import CheckpointError
from alit.codebooks import CodebookPerIteration
from alit.losses import stage1_loss
from alit_kernels.nn import VectorQuantizer
from tests.helpers.models import config, images, model

#: Tokens of an iteration, iterations, channels of a code, as in ``tests.helpers.models``.
STEP, ITERATIONS, DIM = 3, 4, 6


def codebooks(**options: Any) -> CodebookPerIteration:
    torch.manual_seed(0)
    result = CodebookPerIteration(config(codebooks="each", metric="euclidean", **options))
    for quantizer in result:
        nn.init.normal_(quantizer.embedding.weight)
    return result


def vectors(length: int = STEP * ITERATIONS, count: int = 5) -> Tensor:
    return torch.randn(count, length, DIM, generator=torch.Generator().manual_seed(1))


def own(quantizers: CodebookPerIteration, iteration: int) -> VectorQuantizer:
    quantizer = quantizers[iteration]
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer


def test_each_iteration_has_its_own() -> None:
    quantizers = codebooks()
    assert len(quantizers) == ITERATIONS
    z = vectors()
    found = quantizers(z)
    for t in range(ITERATIONS):
        part = slice(t * STEP, (t + 1) * STEP)
        distance = torch.cdist(z[:, part], own(quantizers, t).embedding.weight)
        assert torch.equal(found.index[:, part], distance.argmin(-1))
        codes = own(quantizers, t).embedding.weight[found.index[:, part]]
        torch.testing.assert_close(found.quantized[:, part], codes)


@pytest.mark.parametrize("length", [1, 2, STEP, STEP + 1, 2 * STEP, STEP * ITERATIONS - 1])
def test_lookup_by_position(length: int) -> None:
    """Indices are looked up by position, for prefixes of any length: the same index has another code per iteration."""
    quantizers, z = codebooks(), vectors()
    whole = quantizers(z)
    looked_up = quantizers.codes(whole.index[:, :length])
    torch.testing.assert_close(looked_up, whole.quantized[:, :length].detach())
    prefix = quantizers(z[:, :length])
    assert torch.equal(prefix.index, whole.index[:, :length])
    torch.testing.assert_close(prefix.quantized, whole.quantized[:, :length])
    same = torch.zeros(1, STEP * ITERATIONS, dtype=torch.int64)
    assert len(quantizers.codes(same)[0].unique(dim=0)) == ITERATIONS


@pytest.mark.parametrize(("first", "length"), [(0, STEP), (1, STEP), (2, 2 * STEP), (3, STEP)])
def test_from_a_later_position(first: int, length: int) -> None:
    quantizers, z = codebooks(), vectors()
    part = slice(first * STEP, first * STEP + length)
    found, whole = quantizers(z[:, part], part.start), quantizers(z)
    assert torch.equal(found.index, whole.index[:, part])


@pytest.mark.parametrize("length", [STEP, 2 * STEP, 2 * STEP + 1])
def test_losses_are_means_over_tokens(length: int) -> None:
    quantizers, z = codebooks(commitment=0.5), vectors(length)
    found = quantizers(z)
    error = (found.quantized - z).square().mean()
    torch.testing.assert_close(found.commitment_loss, 0.5 * error)
    torch.testing.assert_close(found.codebook_loss, error)
    torch.testing.assert_close(found.loss, 1.5 * error)


def test_gradients_go_to_the_codebooks_that_were_looked_at() -> None:
    quantizers = codebooks()
    z = vectors(2 * STEP).requires_grad_()
    found = quantizers(z, STEP)
    (found.loss + found.quantized.sum()).backward()
    reached = [own(quantizers, t).embedding.weight.grad is not None for t in range(ITERATIONS)]
    assert reached == [False, True, True, False]
    assert z.grad is not None and bool((z.grad != 0).all())


def test_moving_averages_see_their_own_iteration() -> None:
    """Each codebook is updated as a single quantizer would be with its tokens; those without tokens do not change."""
    options: dict[str, Any] = {"ema_decay": 0.9}
    quantizers, alone = codebooks(**options), codebooks(**options)
    for each in (quantizers, alone):
        each.train()
        for t in range(ITERATIONS):
            own(each, t).set_codebook(torch.randn(32, DIM, generator=torch.manual_seed(t)))
    z, before = vectors(2 * STEP), own(quantizers, 3).embedding.weight.clone()
    quantizers(z, STEP)
    for t, part in ((1, z[:, :STEP]), (2, z[:, STEP:])):
        own(alone, t)(part)
    for name, tensor in quantizers.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], msg=name)
    assert not torch.equal(own(quantizers, 1).embedding.weight, own(quantizers, 2).embedding.weight)
    assert torch.equal(own(quantizers, 3).embedding.weight, before)
    assert own(quantizers, 0).cluster_size.eq(1).all()


def test_shared_by_default() -> None:
    """By default one codebook is shared, and its weights keep the published names."""
    shared, each = model(), model(codebooks="each")
    assert isinstance(shared.quantize, VectorQuantizer)
    assert isinstance(each.quantize, CodebookPerIteration)
    names = {x for x in each.state_dict() if x.startswith("quantize.")}
    assert names == {f"quantize.{t}.embedding.weight" for t in range(ITERATIONS)}
    own_names = {x for x in shared.state_dict() if x.startswith("quantize.")}
    assert own_names == {"quantize.embedding.weight"}


@pytest.mark.parametrize(
    ("base", "recurrence"),
    [
        ("dct", "latents"),
        ("vqgan", "latents"),
        ("vae", "latents"),
        ("dct", "residual"),
        ("vae", "residual"),
    ],
)
def test_in_a_model(base: str, recurrence: str) -> None:
    """Codes looked up from a model's tokens equal those its decoder was given, for every recurrence."""
    m, x = model(base, codebooks="each", recurrence=recurrence), images(3)
    with torch.no_grad():
        for iteration in m.rollout(x):
            index_BL = iteration.bottleneck.index_BL
            assert index_BL is not None and index_BL.shape == (3, iteration.num_tokens)
            torch.testing.assert_close(m.codes(index_BL), iteration.bottleneck.codes_BLC)
            for n in (iteration.num_tokens, iteration.num_tokens - 1):
                tokens = TokenSequence(torch.full((3,), n), indices=index_BL[:, :n].flatten())
                assert iteration.prediction is not None
                lengths = None if n == iteration.num_tokens else torch.full((3,), n)
                expected = m.predict(iteration.bottleneck.codes_BLC, None, lengths)
                torch.testing.assert_close(
                    m.decode(tokens), m.pixels(expected), atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("lengths", [[3, 12, 6, 9], [1, 5, 12, 7]])
def test_lengths_of_their_own(lengths: list[int]) -> None:
    m, x = model(codebooks="each"), images(4)
    tokens = m.encode(x, FixedLength(lengths))
    for b, (image, n) in enumerate(zip(x.split(1), lengths, strict=True)):
        single = m.encode(image, FixedLength(n))
        assert torch.equal(tokens[b].rows, single.rows)
        torch.testing.assert_close(m.decode(tokens)[b], m.decode(single)[0], atol=1e-4, rtol=1e-4)


def test_stream() -> None:
    m, x = model(codebooks="each"), images(6)
    criterion = CodeError(0.5)
    batch = m.encode(x, criterion)
    stream = TokenSequence.concatenate(list(m.encode_stream(x, criterion, max_tokens_in_flight=80)))
    assert torch.equal(stream.lengths, batch.lengths) and torch.equal(stream.rows, batch.rows)


def test_training_reaches_every_codebook() -> None:
    m = model(codebooks="each").train()
    stage1_loss(m, images()).total.backward()
    assert isinstance(m.quantize, CodebookPerIteration)
    for t in range(ITERATIONS):
        grad = own(m.quantize, t).embedding.weight.grad
        assert grad is not None and bool(grad.any()), t


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9, "dead_code_threshold": 0.1},
        {
            "base": DCTConfig(patch_size=8, luma=5, chroma=2, lapped=True),
            "image_size": (32, 48),
        },
    ],
    ids=["learned", "moving averages", "lapped"],
)
def test_save_and_load(tmp_path: Path, options: dict[str, Any]) -> None:
    fields = {"codebooks": "each", "recurrence": "residual", **options}
    m = AdaptiveTokenizer(dataclasses.replace(config(), **fields)).eval()
    x = torch.rand(3, 3, *m.config.image_size, generator=torch.manual_seed(0))
    m.save_pretrained(tmp_path / "model.safetensors")
    again = AdaptiveTokenizer.from_pretrained(tmp_path / "model.safetensors")
    assert again.config == m.config
    tokens, found = (each.encode(x, FixedLength(12)) for each in (m, again))
    assert torch.equal(tokens.rows, found.rows)
    assert torch.equal(
        m.decode(tokens), again.decode(TokenSequence.from_bytes(found.to_bytes(again.identity())))
    )
    state = {k: v for k, v in m.state_dict().items() if k != "quantize.2.embedding.weight"}
    with pytest.raises(CheckpointError, match=r"quantize\.2\.embedding\.weight"):
        AdaptiveTokenizer.from_state(m.config, state)


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="codebooks: expected one of shared, each, got 'both'"):
        config(codebooks="both")
