"""Parity with the published system on the reference tensors in tests/data; always runs.

One quantized model without its base tokenizer, whose tokens are given, and the vector quantizer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer
from alit_kernels.nn import VectorQuantizer
from tests.helpers.golden import (
    GRADIENT,
    LOSS,
    TOKENS,
    Golden,
    captured,
    check_tensors,
    close,
    equal,
    relative,
)

SAMPLE = Golden(Path(__file__).parents[1] / "data")


@torch.no_grad()
def test_evaluation() -> None:
    expected = dict(SAMPLE.tensors("vqgan_quant_eval"))
    model = AdaptiveTokenizer(SAMPLE.config("vqgan", "quant")).eval()
    state = {name: tensor.float() for name, tensor in SAMPLE.tensors("vqgan_state_alit").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("base_tokenizer.") for name in missing)
    model.base_tokenizer.codebook.copy_(expected.pop("base/codebook"))
    images = expected.pop("imgs").float() / 255
    tokens = model.base_tokenizer.tokens(expected["base/tokens"])
    values = {
        "base/tokens": (tokens.tokens_BCHW, 0.0),
        "base/gt_indices": (tokens.target_BN, 0.0),
        "encoder_ln_pre/out": (model.first_input(images, tokens), TOKENS),
        "decoder_query": (model.decoder_query_ND[None], TOKENS),
    }
    for iteration in model.rollout(images, base=tokens):
        values |= captured(iteration)
    check_tensors(values, expected)


@pytest.mark.parametrize("case", sorted(SAMPLE.json("vector_quantizer")["cases"]))
def test_vector_quantizer(case: str) -> None:
    """Forward, losses, gradients, look-up and moving average of one configuration."""
    stored, tensors = SAMPLE.json("vector_quantizer"), SAMPLE.tensors("vector_quantizer")
    options = stored["cases"][case]
    expected = {
        key.removeprefix(f"{case}/"): value
        for key, value in tensors.items()
        if key.startswith(f"{case}/")
    }

    def quantizer() -> VectorQuantizer:
        module = VectorQuantizer(
            stored["codebook_size"],
            stored["token_size"],
            metric="cosine" if options["use_l2_norm"] else "euclidean",
            commitment=stored["commitment_cost"],
            ema_decay=stored["ema_decay"] if options["ema_update"] else None,
            ema_epsilon=stored["ema_eps"],
            ema_rewrites_all=True,
        )
        state = {"embedding.weight": tensors["codebook"]}
        if options["ema_update"]:
            state |= {
                "embed_avg": tensors["codebook"],
                "cluster_size": torch.zeros(stored["codebook_size"]),
            }
        module.load_state_dict(state)
        return module

    assert {k: list(v.shape) for k, v in quantizer().state_dict().items()} == options["state_dict"]
    for mode in ("eval", "train"):
        module = quantizer().train(mode == "train")
        z = tensors["z"].clone().requires_grad_()
        result = module(z)
        equal(result.index, expected[f"{mode}/indices"], f"{mode} indices")
        close(result.quantized, expected[f"{mode}/z_quantized"], 1e-6, f"{mode} z_quantized")
        for name, loss in (
            ("quantizer_loss", result.loss),
            ("commitment_loss", result.commitment_loss),
            ("codebook_loss", result.codebook_loss),
        ):
            relative(loss.item(), expected[f"{mode}/{name}"].item(), LOSS, f"{mode} {name}")
            relative(loss.item(), options["scalars"][f"{mode}/{name}"], LOSS, f"{mode} {name}")
    module = quantizer().train()
    z = tensors["z"].clone().requires_grad_()
    codebook = module.embedding.weight
    result = module(z)
    inputs = [z] if options["grad_codebook_none"] else [z, codebook]
    gradients = torch.autograd.grad(result.loss, inputs, retain_graph=True)
    for gradient, name in zip(gradients, ("grad_z_loss", "grad_codebook_loss"), strict=False):
        wanted = expected[f"train/{name}"]
        close(gradient, wanted, GRADIENT * wanted.abs().max().item(), name)
    assert options["grad_codebook_none"] == (not codebook.requires_grad)
    straight = (result.quantized * tensors["cotangent"]).sum()
    relative(straight.item(), options["scalars"]["train/scalar_ste"], LOSS, "scalar_ste")
    (gradient,) = torch.autograd.grad(straight, [z])
    close(
        gradient,
        expected["train/grad_z_ste"],
        1e-6 * expected["train/grad_z_ste"].abs().max().item(),
        "grad_z_ste",
    )
    # Published look-up returns raw rows (ids 0, 5, some other, 5); a soft index is a weighted average of rows.
    fresh, entries = quantizer(), expected["codebook_entry_1d"]
    assert torch.equal(fresh.embedding(torch.tensor([0, 5, 5])), entries[[0, 1, 3]]), "entry"
    assert (fresh.embedding.weight == entries[2]).all(-1).any(), "entry"
    close(
        tensors["soft_indices"] @ fresh.embedding.weight,
        expected["codebook_entry_2d"],
        1e-5,
        "soft entry",
    )
    if options["ema_update"]:
        check_ema(quantizer().train(), tensors, expected, stored["cases"][case]["scalars"])


def check_ema(
    module: VectorQuantizer,
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    scalars: dict[str, float],
) -> None:
    for step, batch in ((1, "z"), (2, "z_second_batch")):
        result = module(tensors[batch])
        equal(
            result.index, expected[f"after_update{step}/indices_used"], f"indices of update {step}"
        )
        relative(
            result.loss.item(),
            scalars[f"after_update{step}/quantizer_loss"],
            LOSS,
            f"loss of update {step}",
        )
        for name, actual in (
            ("cluster_size", module.cluster_size),
            ("embed_avg", module.embed_avg),
            ("embedding_weight", module.embedding.weight),
        ):
            wanted = expected[f"after_update{step}/{name}"]
            error = (actual - wanted).abs() / wanted.abs().clamp(min=1e-6)
            assert error.max() < 1e-5, f"{name} after update {step}: {error.max():.3g}"
