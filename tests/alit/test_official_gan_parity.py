"""Stage-2 losses against the published system, on the tensors of the folder named by ALIT_GOLDEN_DIR.

Tolerances as the folder's README states them: totals and logged terms 1e-3 relative, gradient norms 2e-2 (they pass
through kinks; norms below 1e-5 are rounding noise), LPIPS gradients by cosine and norm, the discriminator alone 1e-4.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alit import AdaptiveTokenizer
from alit.losses import (
    PatchDiscriminator,
    Perceptual,
    discriminator_loss,
    hinge_loss,
    pixel_loss,
)
from alit.losses.stage2 import reconstructions
from tests.helpers.golden import PIXELS, close, golden, relative

GOLDEN = golden()
TERMS, NORMS = 1e-3, 2e-2


def by_recipe(key: str, kind: str, shape: list[int]) -> Tensor:
    """Weight tensor made by the rule in the folder's README instead of being stored."""
    salt = GOLDEN.json("gan")["recipe_salt"]
    seed = int.from_bytes(hashlib.sha256(f"{salt}|{key}".encode()).digest()[:4], "little")
    u = np.random.RandomState(seed).random_sample(int(np.prod(shape))).reshape(shape)
    values = {
        "conv_weight": lambda: (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:])),
        "conv_bias": lambda: (2 * u - 1) * 0.05,
        "bn_scale": lambda: 1 + 0.2 * (2 * u - 1),
        "bn_shift": lambda: 0.1 * (2 * u - 1),
        "lin": lambda: 0.1 * u,
        "zero": lambda: np.zeros(shape),
    }[kind]()
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def state_by_recipe(recipe: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    state = {}
    for name, entry in recipe.items():
        if entry["kind"] == "constructor":
            continue
        value = by_recipe(prefix + name, entry["kind"], entry["shape"])
        if "sha256" in entry:
            digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()
            assert digest == entry["sha256"], name
        state[name] = value
    return state


def perceptual() -> Perceptual:
    module = Perceptual(unit_range=True)
    recipe = state_by_recipe(GOLDEN.json("gan")["lpips_recipe"], "perceptual_loss.")
    module.load_state_dict(recipe)
    return module


@cache
def perceptual_of_the_images() -> Perceptual:
    """LPIPS that caches features of the stored images, which take a quarter of each test's time."""
    module, known = perceptual(), {}
    compute = module._slice

    def features(number: int, x: Tensor) -> Tensor:
        if x.requires_grad:
            return compute(number, x)
        if number not in known:
            known[number] = compute(number, x)
        return known[number]

    module._slice = features
    return module


def discriminator(iteration: int) -> PatchDiscriminator:
    recipe = GOLDEN.json("gan")["discriminator_recipe"]
    prefix = f"gan_losses.{iteration}.discriminator."
    module = PatchDiscriminator()
    module.load_state_dict(state_by_recipe(recipe[str(iteration)], prefix))
    return module.train()


def fakes() -> Tensor:
    return GOLDEN.images.flip(3) * 0.5 + 0.25


def test_discriminator_alone() -> None:
    tensors = GOLDEN.tensors("gan_discriminator")
    scalars = GOLDEN.json("gan")["discriminator_ndf16"]
    module = PatchDiscriminator(16)
    prefix = "state/"
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        real, fake = module(GOLDEN.images), module(fakes())
    close(real, tensors["eval/logits_real"], 1e-4, "eval real")
    close(fake, tensors["eval/logits_fake"], 1e-4, "eval fake")
    expected = scalars["hinge"]["d_loss_from_eval_logits"]
    relative(hinge_loss(real, fake).item(), expected, 1e-5, "hinge")
    module.train()
    real, fake = module(GOLDEN.images), module(fakes())
    close(real, tensors["train/logits_real"], 1e-4, "train real")
    close(fake, tensors["train/logits_fake"], 1e-4, "train fake")
    loss = hinge_loss(real, fake)
    relative(loss.item(), scalars["hinge"]["d_loss"], 1e-5, "hinge")
    loss.backward()
    for name, parameter in module.named_parameters():
        norm = scalars["hinge"]["grad_norm"][name]
        relative(parameter.grad.norm().item(), norm, 1e-3, f"gradient norm of {name}")
    for name, buffer in module.named_buffers():
        wanted = tensors[f"train/after_real_then_fake/{name}"]
        close(buffer.float(), wanted.float(), 1e-4, name)


def test_lpips() -> None:
    tensors, scalars = GOLDEN.tensors("gan_lpips"), GOLDEN.json("gan")["lpips"]
    second = fakes().requires_grad_()
    distance = perceptual()
    value = distance(GOLDEN.images, second)
    torch.testing.assert_close(value, tensors["value"].flatten(), rtol=1e-4, atol=0)
    value.sum().backward()
    ours, theirs = second.grad[:, :, ::8, ::8], tensors["grad_second_input_sub8"]
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.995
    relative(second.grad.norm().item(), scalars["grad_second_input_norm"], NORMS, "gradient norm")
    identical = distance(GOLDEN.images, GOLDEN.images)
    assert torch.equal(identical, tensors["value_identical"].flatten())


def trainable(base: str, variant: str) -> AdaptiveTokenizer:
    model = GOLDEN.model(base, variant).train()
    model.base_tokenizer.requires_grad_(True)
    return model


def check_norms(
    own: dict[str, torch.nn.Parameter], expected: dict[str, float | None], what: str
) -> None:
    compared = 0
    for name, norm in expected.items():
        if name.startswith("perceptual") or "perceptual_loss" in name:
            continue
        parameter = own[name]
        if norm is None:
            assert parameter.grad is None, f"{what}: gradient of {name}"
            continue
        if norm >= 1e-5:
            actual = parameter.grad.double().norm().item()
            relative(actual, norm, NORMS, f"{what}: gradient norm of {name}")
            compared += 1
    assert compared >= 13  # the discriminator alone has as many


RUNS = [("vqgan", "quant"), ("vae", "cont")]


@pytest.mark.parametrize("case", ["gen_w0_it3", "gen_w02_it3", "gen_w08_it0", "disc_w02_it3"])
@pytest.mark.parametrize("base,variant", RUNS)
def test_stage2(base: str, variant: str, case: str) -> None:
    scalars = GOLDEN.json("gan")[f"stage2_{base}_{variant}"][case]
    tensors = GOLDEN.tensors(f"gan_stage2_{base}_{variant}")
    model, at, weight = trainable(base, variant), scalars["iteration"], scalars["gan_loss_weight"]
    judge, logs = discriminator(at), scalars["logs"]
    tokens = GOLDEN.base_tokens(model, base)
    ((_, pixels, quantization, _),) = reconstructions(model, GOLDEN.images, [at], tokens)
    if case.startswith("gen"):
        # At weight 0 the published step still runs the discriminator, to log its output.
        judge_or_none = judge if weight > 0 else None
        total, terms = pixel_loss(
            *(model, GOLDEN.images, pixels, quantization, judge_or_none),
            perceptual_of_the_images(),
            gan_weight=weight,
        )
        terms["reconstruction"] = terms["l1"] + terms["perceptual"]
        for published, name in (
            *(("rec_loss", "reconstruction"), ("p_loss", "perceptual")),
            *(("d_weight", "weight"), ("g_loss", "adversarial")),
        ):
            if name in terms:  # The adaptive weight is a ratio of gradient norms.
                bound = NORMS if name == "weight" else TERMS
                expected = logs[f"train/{published}_{at}"]
                relative(terms[name].item(), expected, bound, f"{case} {name}")
        loss = 0.0 if quantization is None else quantization.item()
        relative(loss, logs.get(f"quantization_loss_{at}", 0.0), TERMS, "vq")
        share = (terms["weight"] * terms["adversarial"]).item() if weight > 0 else 0.0
        bound = TERMS + NORMS * abs(share / scalars["total_loss"])
    else:
        # The published step adds the quantizer's loss, then discards its gradient.
        total, judged = discriminator_loss(GOLDEN.images, pixels, judge)
        relative(judged["real"].item(), logs[f"train/logits_real_{at}"], TERMS, f"{case} real")
        relative(judged["fake"].item(), logs[f"train/logits_fake_{at}"], TERMS, f"{case} fake")
        relative(total.item(), logs[f"train/disc_loss_{at}"], TERMS, f"{case} disc_loss")
        total, bound = total + (0.0 if quantization is None else quantization), TERMS
    relative(total.item(), scalars["total_loss"], bound, f"{case} total")
    close(pixels.detach()[:, :, ::4, ::4], tensors[f"{case}/recon_sub4"], PIXELS, f"{case} pixels")
    total.backward()
    own = dict(model.named_parameters())
    judged_by = f"gan_losses.{at}.discriminator."
    own |= {f"{judged_by}{name}": p for name, p in judge.named_parameters()}
    expected = {
        name: norm
        for name, norm in scalars["grad_norm"].items()
        if not name.startswith("gan_losses.") or (weight > 0 and name.startswith(judged_by))
    }
    check_norms(own, expected, case)
    for name, value in tensors.items():
        prefix = f"{case}/grad/"
        if name.startswith(prefix) and float(value.norm()) >= 1e-5:
            gradient = own[name.removeprefix(prefix)].grad
            cosine = torch.cosine_similarity(gradient.flatten(), value.flatten(), dim=0)
            assert cosine > 0.999, f"{name}: cosine {float(cosine)}"
    if weight == 0:
        return
    buffers, prefix = dict(judge.named_buffers()), f"{case}/bn_after/"
    after = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert after
    for name, value in after.items():
        close(buffers[name].float().view_as(value), value.float(), 1e-3, name)
