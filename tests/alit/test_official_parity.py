"""Parity with the published system, on the tensors of the folder named by ALIT_GOLDEN_DIR.

The folder's README says how each value was made and which tolerance it bears; those tolerances are used here:
1e-4 for tokens, latents and logits, 5e-4 for pixels, 1e-6 relative for losses, 1e-5 relative for gradients, equality
for indices and masks. Every dimension is taken from the folder's JSON files.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, MaxL1, stage1_loss
from alit.losses import Stage1Loss
from tests.helpers.golden import (
    GRADIENT,
    LOSS,
    PIXELS,
    TOKENS,
    captured,
    check_tensors,
    close,
    equal,
    golden,
    relative,
)

GOLDEN = golden()
BASES, VARIANTS = ("vqgan", "vae"), ("quant", "cont", "nofact")


@pytest.mark.parametrize("name", GOLDEN.json("full_state_dict_keys")["models"])
def test_state_dict_keys(name: str) -> None:
    size, base, variant = name.split("/")
    config = AdaptiveTokenizerConfig.of_size(
        size.removeprefix("alit_"), base=base, bottleneck=variant
    )
    with torch.device("meta"):
        own = {
            key: list(value.shape) for key, value in AdaptiveTokenizer(config).state_dict().items()
        }
    stored = GOLDEN.json("full_state_dict_keys")["models"][name]["tensors"]
    assert own == {key: shape for key, shape, *_ in stored if not key.startswith("gan_losses.")}


def test_state_dict_keys_unfactorized() -> None:
    entry = GOLDEN.json("full_state_dict_keys")[
        "alit_small_vqgan_continuous_unfactorized_vs_factorized"
    ]
    with torch.device("meta"):
        states = [
            set(AdaptiveTokenizer.from_size("small", bottleneck=bottleneck).state_dict())
            for bottleneck in ("continuous", "unfactorized")
        ]
    assert states[0] - states[1] == set(entry["missing"])
    assert states[1] - states[0] == set(entry["extra"])


@torch.no_grad()
def test_vqgan() -> None:
    expected, base = GOLDEN.tensors("vqgan_base"), GOLDEN.model("vqgan", "quant").base_tokenizer
    z = base.vqgan.encoder(GOLDEN.images)
    close(z, expected["z"], TOKENS, "z")
    result, loss = base.vqgan.quantized(z)
    equal(result.index, expected["indices"], "indices")
    equal(base.encode(GOLDEN.images).target_BN, expected["indices"], "targets")
    close(result.quantized.transpose(1, 2).view_as(z), expected["z_q"], TOKENS, "z_q")
    relative(loss.item(), expected["emb_loss"].item(), LOSS, "emb_loss")
    pixels = base.pixels(result.quantized, z.shape[2:])
    close(pixels[:, :, ::4, ::4], expected["decode_zq_sub4"], PIXELS, "decode_zq")


@torch.no_grad()
def test_vae() -> None:
    expected, base = GOLDEN.tensors("vae_base"), GOLDEN.model("vae", "quant").base_tokenizer
    posterior = base.vae.encode(GOLDEN.images)
    close(posterior.mean, expected["mean"], TOKENS, "mean")
    close(posterior.logvar, expected["logvar"], TOKENS, "logvar")
    close(posterior.sample(expected["noise"]) * base.scale, expected["tokens"], TOKENS, "tokens")
    for actual, kl in zip(posterior.kl(), expected["kl"], strict=True):
        relative(actual.item(), kl.item(), LOSS, "kl")
    close(
        base.vae.decode(posterior.mean)[:, :, ::4, ::4],
        expected["decode_mean_sub4"],
        PIXELS,
        "decode_mean",
    )


#: Decoded images by type of base and hash of the code.
DECODED: dict[tuple[type, bytes], Tensor] = {}


def decoding_once(model: AdaptiveTokenizer) -> AdaptiveTokenizer:
    """The model with decoded images cached over all tests, since decoding takes the most time."""
    decode = model.base_tokenizer.pixels

    def pixels(code_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        digest = hashlib.sha256(code_BNC.numpy().tobytes()).digest()
        key = (type(model.base_tokenizer), digest)
        if key not in DECODED:
            DECODED[key] = decode(code_BNC, grid)
        return DECODED[key]

    model.base_tokenizer.pixels = pixels
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_evaluation(base: str, variant: str) -> None:
    model = decoding_once(GOLDEN.model(base, variant))
    scalars = GOLDEN.json(f"{base}_{variant}")
    expected = dict(GOLDEN.tensors(f"{base}_{variant}_eval"))
    shared = GOLDEN.json(f"{base}_{variant}").get("eval_keys_shared_with_quant_eval_file", [])
    quant = GOLDEN.tensors(f"{base}_quant_eval")
    expected |= {name: quant[name] for name in shared if name in quant}
    tokens = GOLDEN.base_tokens(model, base)
    values = {
        "base/tokens": (tokens.tokens_BCHW, TOKENS),
        "patch_embed": (model.patch_embed(GOLDEN.images), TOKENS),
        "encoder_ln_pre/out": (model.first_input(GOLDEN.images, tokens), TOKENS),
        "decoder_query": (model.decoder_query_ND[None], TOKENS),
    }
    if tokens.target_BN is not None:
        values["base/gt_indices"] = (tokens.target_BN, 0.0)
    rollout = model.rollout(GOLDEN.images, base=tokens)
    for iteration in rollout:
        if iteration.index == 0:
            values["encoder_in_iter1"] = (rollout.tokens_BSD, TOKENS)
        pixels = model.pixels(iteration.prediction)
        values |= captured(iteration, pixels)
        names = ("recon_mean_std", "recon_l1_per_iteration", "decoded_std")
        (mean, std), l1, decoded = (scalars[name][iteration.index] for name in names)
        for found, wanted, tolerance in (
            ((pixels - GOLDEN.images).abs().mean(), l1, PIXELS),
            (pixels.mean(), mean, PIXELS),
            (pixels.std(), std, PIXELS),
            (iteration.prediction.decoded_BNV.std(), decoded, TOKENS),
        ):
            assert abs(found.item() - wanted) < tolerance
    check_tensors(values, expected)


@torch.no_grad()
def test_sampled_codes() -> None:
    """The published stage-1 images are decoded from sampled ids; the ids are given, the sampler is not compared."""
    expected, model = (
        GOLDEN.tensors("vqgan_quant_stage1_sampled_recon"),
        GOLDEN.model("vqgan", "quant"),
    )
    base = model.base_tokenizer
    for name in sorted({key.split("/")[0] for key in expected}):
        pixels = base.pixels(
            base.codebook[expected[f"{name}/sampled_ids"].long()], model.config.grid
        )
        close(pixels[:, :, ::4, ::4], expected[f"{name}/recon_sub4"], PIXELS, name)


RULES = [(b, v) for b in BASES for v in VARIANTS if "encode_api" in GOLDEN.json(f"{b}_{v}")]


@torch.no_grad()
@pytest.mark.parametrize("base,variant", RULES)
def test_encode_rule(base: str, variant: str) -> None:
    model = decoding_once(GOLDEN.model(base, variant))
    tokens = GOLDEN.base_tokens(model, base)
    iterations = list(model.rollout(GOLDEN.images, base=tokens))
    rules = GOLDEN.json(f"{base}_{variant}")["encode_api"]
    assert rules
    for threshold, rule in rules.items():
        sequence = model.encode(GOLDEN.images, MaxL1(float(threshold)), base=tokens)
        assert sequence.lengths.tolist() == [rule["returned_num_latents"]] * len(GOLDEN.images)
        iteration = iterations[rule["returned_iteration"]]
        assert iteration.num_tokens == rule["returned_num_latents"]
        error = MaxL1(float(threshold)).error(iteration, model).mean().item()
        assert abs(error - rule["recon_l1"]) < PIXELS
        close(sequence.padded(), iteration.bottleneck.continuous_BLC, TOKENS, "returned tokens")


def check_training(
    model: AdaptiveTokenizer, loss: Stage1Loss, scalars: dict[str, Any], what: str
) -> None:
    relative(loss.total.item(), scalars["total_loss"], LOSS, f"{what} total")
    actual = {}
    for index, term in loss.iterations.items():
        if term.nll is not None:
            actual[f"nll_loss_{index}"] = term.nll.item()
        actual[f"code_loss_{index}"] = term.code.item()
        actual[f"quantization_loss_{index}"] = term.quantization.item()
    assert scalars["per_iteration"].keys() <= actual.keys()
    for name, value in actual.items():
        # Without a quantizer its loss is 0 and not stored.
        relative(value, scalars["per_iteration"].get(name, 0.0), LOSS, f"{what} {name}")
    loss.total.backward()
    norms = scalars["grad_norm"]
    own = {
        name: p.grad
        for name, p in model.named_parameters()
        if not name.startswith("base_tokenizer.")
    }
    assert own.keys() == norms.keys()
    for name, norm in norms.items():
        gradient = own[name]
        assert (gradient is None) == (norm is None), f"{what}: gradient of {name}"
        if gradient is not None:
            relative(
                gradient.double().norm().item(), norm, GRADIENT, f"{what} gradient norm of {name}"
            )


def check_gradients(model: AdaptiveTokenizer, expected: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, gradient in expected.items():
        if key.startswith("grad/"):
            actual = parameters[key.removeprefix("grad/")].grad
            error = (actual - gradient).double().norm() / gradient.double().norm()
            assert error <= GRADIENT, f"{key}: relative error {error:.3g}"


def training_model(base: str, variant: str, **overrides: Any) -> AdaptiveTokenizer:
    model = GOLDEN.model(base, variant, **overrides).train()
    model.base_tokenizer.eval()
    return model


def subsets(scalars: dict[str, Any]) -> list[tuple[str, list[int]]]:
    prefix = "train_stage1_subset_"
    return [
        (key, [int(i) for i in key.removeprefix(prefix).split("_")])
        for key in scalars
        if key.startswith(prefix)
    ]


# Only one variant runs the decoder in both ways: other tests compare the two for all variants.
@pytest.mark.parametrize("variant, together", [*((v, True) for v in VARIANTS), ("quant", False)])
@pytest.mark.parametrize("base", BASES)
def test_training(base: str, variant: str, together: bool) -> None:
    scalars = GOLDEN.json(f"{base}_{variant}")
    for key, at in [("train_stage1", None), *subsets(scalars)]:
        model = training_model(base, variant)
        with torch.no_grad():
            tokens = GOLDEN.base_tokens(model, base)
        weights = scalars["train_stage1"]["lambda_loss_weight"]
        loss = stage1_loss(
            model, GOLDEN.images, at=at, base=tokens, weights=weights, together=together
        )
        check_training(model, loss, scalars[key], key)
        if at is None and (GOLDEN.folder / f"{base}_{variant}_train.safetensors").exists():
            check_gradients(model, GOLDEN.tensors(f"{base}_{variant}_train"))


def halting_variants() -> list[str]:
    return [variant for variant in VARIANTS if "halting" in GOLDEN.json(f"vqgan_{variant}")]


def stored_draws(name: str) -> Any:
    draws = iter(GOLDEN.tensors(name)["raw_draw"].bool())
    return lambda p: next(draws)


@torch.no_grad()
@pytest.mark.parametrize("variant", halting_variants())
def test_halting_evaluation(variant: str) -> None:
    scalars, expected = (
        GOLDEN.json(f"vqgan_{variant}")["halting"],
        GOLDEN.tensors(f"vqgan_{variant}_halting_eval"),
    )
    model = GOLDEN.model("vqgan", variant, halting="mask", halting_threshold=scalars["threshold"])
    rollout = model.rollout(
        GOLDEN.images, halting_draw=stored_draws(f"vqgan_{variant}_halting_eval")
    )
    values: dict[str, tuple[Tensor, float]] = {}
    for iteration in rollout:
        index = iteration.index
        equal(iteration.halted, expected["final_mask"][index], f"mask {index}")
        assert int(iteration.halted.sum()) == scalars["masked_tokens_per_iteration"][index]
        close(iteration.prediction.p_target_BN, expected["p_gt"][index], TOKENS, f"p_gt {index}")
        if index == 0:
            values["encoder_in_iter1"] = (rollout.tokens_BSD, TOKENS)
        wanted = f"iter{index}/recon_sub4" in expected  # decoding takes longer than all else
        pixels = model.pixels(iteration.prediction) if wanted else None
        values |= captured(iteration, pixels)
    apart = ("final_mask", "p_gt", "raw_draw")
    check_tensors(values, {name: x for name, x in expected.items() if name not in apart})


@pytest.mark.parametrize("variant", halting_variants())
def test_halting_training(variant: str) -> None:
    scalars = GOLDEN.json(f"vqgan_{variant}")["halting"]
    draws, expected = (
        f"vqgan_{variant}_halting_eval",
        GOLDEN.tensors(f"vqgan_{variant}_halting_train"),
    )
    for key, at in [("train_stage1", None), *subsets(scalars)]:
        model = training_model(
            "vqgan", variant, halting="mask", halting_threshold=scalars["threshold"]
        )
        weights = scalars["train_stage1"]["lambda_loss_weight"]
        draw = stored_draws(draws)
        probabilities: list[Tensor] = []

        def watched(p: Tensor, draw: Any = draw, seen: list[Tensor] = probabilities) -> Tensor:
            seen.append(p)
            return draw(p)

        loss = stage1_loss(model, GOLDEN.images, at=at, weights=weights, halting_draw=watched)
        check_training(model, loss, scalars[key], f"halting {key}")
        if at is None:
            close(torch.stack(probabilities), expected["train_p_gt"], TOKENS, "train_p_gt")
            check_gradients(model, expected)
        else:
            assert len(probabilities) == scalars[key]["bernoulli_calls"]
            bits = GOLDEN.tensors(draws)["raw_draw"].bool()
            masked = [
                int((bits[i] & (p >= scalars["threshold"])).sum())
                for i, p in enumerate(probabilities)
            ]
            assert masked == scalars[key]["masked_tokens"]


def test_vae_halting_is_noop() -> None:
    scalars = GOLDEN.json("vae_quant")
    expected = scalars["halting_is_noop"]
    model = training_model("vae", "quant", halting="mask", halting_threshold=expected["threshold"])
    with torch.no_grad():
        tokens = GOLDEN.base_tokens(model, "vae")
    loss = stage1_loss(
        model, GOLDEN.images, base=tokens, weights=scalars["train_stage1"]["lambda_loss_weight"]
    )
    relative(loss.total.item(), expected["total_loss_halting_on"], LOSS, "total")
    loss.total.backward()
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert zero == expected["params_whose_gradient_becomes_zero_instead_of_none"]
