"""Reading a folder of reference tensors of the published system, and comparing with them."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alit import (
    AdaptiveTokenizer,
    AdaptiveTokenizerConfig,
    KLVAEConfig,
    Quirks,
    TransformerConfig,
    VQGANConfig,
)
from alit.base import BaseTokens
from alit.config import BaseConfig
from alit.model_file import load_state
from alit_kernels.nn import VectorQuantizer

#: Absolute for tokens, latents, logits and for pixels; relative for losses and gradients.
TOKENS, PIXELS, LOSS, GRADIENT = 1e-4, 5e-4, 1e-6, 1e-5


class Golden:
    """One folder. Every dimension is taken from its JSON files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019
    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @cache  # noqa: B019
    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    @property
    def images(self) -> Tensor:
        return self.tensors("inputs")["imgs"]

    def config(self, base: str, variant: str, **overrides: Any) -> AdaptiveTokenizerConfig:
        stored = self.json(f"{base}_config")
        fields = {**stored["adaptive_tokenizer_config"], **stored["variants"][variant]}
        bottleneck = "quantized" if fields["quantize_latent"] else "continuous"
        return AdaptiveTokenizerConfig(
            base=_base_config(base, stored["base_tokenizer_config"]),
            encoder=TransformerConfig(
                *(fields[f"encoder_{x}"] for x in ("width", "num_layers", "num_heads"))
            ),
            decoder=TransformerConfig(
                *(fields[f"decoder_{x}"] for x in ("width", "num_layers", "num_heads"))
            ),
            bottleneck=bottleneck if fields["factorize_latent"] else "unfactorized",
            image_size=(fields["img_size"], fields["img_size"]),
            latents_per_iteration=fields["num_init_latent_tokens"],
            iterations=fields["max_rollout_iters"],
            codebook_size=fields["vq_codebook_size"],
            code_dim=fields["vq_token_dim"],
            commitment=fields["vq_commitment_cost"],
            metric="cosine" if fields["vq_use_l2_norm"] else "euclidean",
            quirks=Quirks.official(),
            **overrides,
        )

    def state(self, base: str, variant: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file in self.json(f"{base}_config")["state_files"]:
            state |= self.tensors(file.removesuffix(".safetensors"))
        dropped = {
            "quant": (),
            "cont": ("quantize.",),
            "nofact": ("quantize.", "decoder.decoder_embed."),
        }[variant]
        return {
            key: value for key, value in state.items() if not key.startswith(tuple(dropped) or "-")
        }

    def model(self, base: str, variant: str, **overrides: Any) -> AdaptiveTokenizer:
        model = AdaptiveTokenizer(self.config(base, variant, **overrides))
        load_state(model, self.state(base, variant))
        model.base_tokenizer.requires_grad_(False)
        return model.eval()

    def base_tokens(self, model: AdaptiveTokenizer, base: str) -> BaseTokens:
        """Base tokens with the stored posterior noise (KL-VAE); the VQGAN is deterministic."""
        if base == "vqgan":
            return model.base_tokenizer.encode(self.images)
        posterior = model.base_tokenizer.vae.encode(self.images)
        return model.base_tokenizer.tokens(
            posterior.sample(self.tensors("vae_base")["noise"]) * model.config.base.scale
        )


def _base_config(base: str, stored: dict[str, Any]) -> BaseConfig:
    layout = {
        "latent_channels": stored["embed_dim"],
        "channels": stored["ch"],
        "multipliers": tuple(stored["ch_mult"]),
        "blocks": stored["num_res_blocks"],
    }
    if base == "vqgan":
        return VQGANConfig(num_codes=stored["n_embed"], **layout)
    levels = range(len(stored["ch_mult"]))
    attention = tuple(
        i for i in levels if stored["resolution"] // 2**i in stored["attn_resolutions"]
    )
    return KLVAEConfig(scale=stored["vae_scale"], attention_levels=attention, **layout)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"{what}: off by {error:.3g}, tolerance {tolerance:.3g}"


def equal(actual: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(actual.long(), expected.long()), (
        f"{what}: {(actual != expected).sum()} differ"
    )


def relative(actual: float, expected: float, tolerance: float, what: str) -> None:
    assert math.isclose(actual, expected, rel_tol=tolerance, abs_tol=1e-12), (
        f"{what}: {actual} for {expected}"
    )


def check_vector_quantizer(golden: Golden, case: str) -> None:
    """Forward, losses, gradients, look-up and moving average of one configuration."""
    stored, tensors = golden.json("vector_quantizer"), golden.tensors("vector_quantizer")
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
