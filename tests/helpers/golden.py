"""Read a folder of reference tensors of the published system, and compare with them."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
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
from alit.base_config import BaseConfig
from alit.iteration import Iteration
from alit.model_file import load_state

#: Tolerances: absolute for tokens, latents and logits, and for pixels; relative for losses and for gradients.
TOKENS, PIXELS, LOSS, GRADIENT = 1e-4, 5e-4, 1e-6, 1e-5


class Golden:
    """Folder of reference tensors; dimensions of models are read from its JSON files."""

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
        return {key: x for key, x in state.items() if not key.startswith(dropped or "-")}

    def model(self, base: str, variant: str, **overrides: Any) -> AdaptiveTokenizer:
        model = AdaptiveTokenizer(self.config(base, variant, **overrides))
        load_state(model, self.state(base, variant))
        model.base_tokenizer.requires_grad_(False)
        return model.eval()

    def base_tokens(self, model: AdaptiveTokenizer, base: str) -> BaseTokens:
        """Base tokens of the stored images; the KL-VAE uses the stored posterior noise, the VQGAN is deterministic."""
        if base == "vqgan":
            return model.base_tokenizer.encode(self.images)
        posterior = model.base_tokenizer.vae.encode(self.images)
        return model.base_tokenizer.tokens(
            posterior.sample(self.tensors("vae_base")["noise"]) * model.config.base.scale
        )


def golden() -> Golden:
    """Reference tensors in the folder ``ALIT_GOLDEN_DIR``; skips the module if it is not set."""
    folder = os.environ.get("ALIT_GOLDEN_DIR")
    if not folder:
        reason = "ALIT_GOLDEN_DIR is not set: it names the folder of reference tensors"
        pytest.skip(reason, allow_module_level=True)
    return Golden(Path(folder))


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


def check_tensors(values: dict[str, tuple[Tensor, float]], expected: dict[str, Tensor]) -> None:
    """Check every expected tensor against (value, tolerance) of the same name."""
    for name, tensor in expected.items():
        actual, tolerance = values[name]
        close(actual, tensor, tolerance, name)


def captured(iteration: Iteration, pixels: Tensor | None = None) -> dict[str, tuple[Tensor, float]]:
    """Name -> (our value, tolerance) of the tensors that may be stored for an iteration, and of pixels if given."""
    bottleneck, prediction = iteration.bottleneck, iteration.prediction
    values = {
        "latent_tokens": (iteration.latents_BLD, TOKENS),
        "class_and_image_tokens": (iteration.image_tokens_BND, TOKENS),
        "latent_prequant": (bottleneck.continuous_BLC, TOKENS),
        "decoded": (prediction.decoded_BNV, TOKENS),
        "decoded_code": (prediction.code_BNC, TOKENS),
    }
    if pixels is not None:
        values["recon_sub4"] = (pixels[:, :, ::4, ::4], PIXELS)
        values["recon_crop"] = (pixels[:, :, 96:160, 96:160], PIXELS)
    if bottleneck.quantized is not None:
        quantized = bottleneck.quantized
        values |= {
            "latent_quantized": (quantized.quantized, TOKENS),
            "indices": (quantized.index, 0.0),
            "quantizer_loss": (quantized.loss[None], LOSS * quantized.loss.item()),
            "commitment_loss": (quantized.commitment_loss[None], LOSS * quantized.loss.item()),
            "codebook_loss": (quantized.codebook_loss[None], LOSS * quantized.loss.item()),
        }
    return {f"iter{iteration.index}/{name}": value for name, value in values.items()}
