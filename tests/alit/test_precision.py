"""Models work in every dtype and under autocast."""

from __future__ import annotations

import pytest
import torch

from alit import AdaptiveTokenizer, CodeError, FixedLength, MaxL1, TokenAccuracy
from alit.attention_maps import latent_attention
from alit.criterion import Criterion
from alit.losses import stage1_loss
from tests.helpers.models import BASES, VARIANTS, images, model

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(m: AdaptiveTokenizer, x: torch.Tensor, criterion: Criterion, dtype: torch.dtype) -> None:
    """Check that encoding, in batches and streams, decoding and attention maps work with finite values of ``dtype``."""
    tokens = m.encode(x, criterion)
    pixels = m.decode(tokens)
    assert pixels.shape == x.shape and pixels.dtype == dtype
    assert bool(pixels.isfinite().all())
    if tokens.indices is None:
        assert bool(tokens.rows.isfinite().all())
    stream = list(m.encode_stream(x, criterion, max_tokens_in_flight=200))
    assert len(stream) == len(x)
    for one in stream:
        assert bool(m.decode(one).isfinite().all())
    attention = latent_attention(m, x, iteration=1)
    assert attention.shape == (3, 6, *m.config.grid) and attention.dtype == torch.float32
    assert bool((attention >= 0).all()) and bool((attention.sum((2, 3)) <= 1.02).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bottleneck", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_a_model_of_this_dtype(base: str, bottleneck: str, dtype: torch.dtype) -> None:
    m, x = model(base, bottleneck=bottleneck).to(dtype), images().to(dtype)
    third = TokenAccuracy(0.1) if base == "vqgan" else CodeError(0.5)
    for criterion in (FixedLength([3, 9, 12]), MaxL1(0.3), third):
        check(m, x, criterion, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("bottleneck", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_a_model_under_autocast(base: str, bottleneck: str, dtype: torch.dtype) -> None:
    """Under autocast, encoding, criteria, decoding and a training step work, for images of both precisions."""
    m = model(base, bottleneck=bottleneck, halting="mask", ema_decay=0.9)
    cases = ((images(), FixedLength([3, 9, 12])), (images().to(dtype), MaxL1(0.3)))
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        for x, criterion in cases:
            assert bool(m.decode(m.encode(x, criterion)).isfinite().all())
            for one in m.encode_stream(x, criterion, max_tokens_in_flight=200):
                assert bool(m.decode(one).isfinite().all())
        latent_attention(m, images(1), iteration=1)
    m.train()
    with torch.autocast("cpu", dtype=dtype):
        loss = stage1_loss(m, images()).total
    loss.backward()
    gradients = [p.grad for p in m.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ("cosine", "euclidean"))
def test_decoded_tokens_are_those_that_were_encoded(metric: str, dtype: torch.dtype) -> None:
    """Codes looked up by index equal those the decoder got from the quantizer, in the same dtype."""
    m, x = model(metric=metric).to(dtype), images().to(dtype)
    with torch.no_grad():
        last = list(m.rollout(x))[-1]
    codes = m.codes(last.bottleneck.quantized.index)
    assert codes.dtype == dtype and torch.equal(codes, last.bottleneck.codes_BLC)
