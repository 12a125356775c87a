"""Reading a folder of reference tensors of the published system (structure: see tests/alit/test_official_parity.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

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
from alit.checkpoint import load_state
from alit.config import BaseConfig


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
            bottleneck=bottleneck if fields["factorize_latent"] else "unfactorised",
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
