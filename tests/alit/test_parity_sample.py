"""Parity with the published system on the part of the reference tensors that lies in tests/data; always runs.

One quantized model without its base tokenizer, whose tokens are given, and the vector quantizer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alit import AdaptiveTokenizer
from alit.base import BaseTokens, VQGANBase
from tests.helpers.golden import (
    LOSS,
    TOKENS,
    Golden,
    check_vector_quantizer,
    close,
    equal,
    relative,
)

SAMPLE = Golden(Path(__file__).parents[1] / "data")


@pytest.fixture(scope="module")
def model() -> AdaptiveTokenizer:
    model = AdaptiveTokenizer(SAMPLE.config("vqgan", "quant"))
    state = {name: tensor.float() for name, tensor in SAMPLE.tensors("vqgan_state_alit").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("base_tokenizer.") for name in missing)
    with torch.no_grad():
        base = model.base_tokenizer
        assert isinstance(base, VQGANBase)
        base.codebook.copy_(SAMPLE.tensors("vqgan_quant_eval")["base/codebook"])
    return model.eval()


@torch.no_grad()
def test_evaluation(model: AdaptiveTokenizer) -> None:
    expected = SAMPLE.tensors("vqgan_quant_eval")
    images = expected["imgs"].float() / 255
    base = model.base_tokenizer
    assert isinstance(base, VQGANBase)
    tokens: BaseTokens = base.tokens(expected["base/tokens"])
    equal(tokens.target_BN, expected["base/gt_indices"], "targets")
    close(model.first_input(images, tokens), expected["encoder_ln_pre/out"], TOKENS, "first input")
    close(model.decoder_query_ND[None], expected["decoder_query"], TOKENS, "decoder query")
    compared = set()
    for iteration in model.rollout(images, base=tokens):
        quantized, prediction = iteration.bottleneck.quantized, iteration.prediction
        assert quantized is not None and prediction is not None
        values = {
            "latent_tokens": iteration.latents_BLD,
            "latent_prequant": iteration.bottleneck.continuous_BLC,
            "latent_quantized": quantized.quantized,
            "decoded": prediction.decoded_BNV,
            "decoded_code": prediction.code_BNC,
        }
        for name, value in values.items():
            key = f"iter{iteration.index}/{name}"
            if key in expected:
                close(value, expected[key], TOKENS, key)
                compared.add(key)
        equal(quantized.index, expected[f"iter{iteration.index}/indices"], "indices")
        loss = expected[f"iter{iteration.index}/quantizer_loss"].item()
        relative(quantized.loss.item(), loss, LOSS, "quantizer loss")
    assert len(compared) == 5


@pytest.mark.parametrize("case", sorted(SAMPLE.json("vector_quantizer")["cases"]))
def test_vector_quantizer(case: str) -> None:
    check_vector_quantizer(SAMPLE, case)
