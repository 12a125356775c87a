"""Published checkpoints (``.pth``): state dicts as they are distributed, and the configuration inferred from shapes.

``torch_archive.py`` reads the files, without trust in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import torch_archive
from .base_config import BaseConfig, KLVAEConfig, VQGANConfig
from .checks import CheckpointError, check_choice, some
from .config import SIZES, AdaptiveTokenizerConfig, Quirks, TransformerConfig

#: Prefixes of parameter names in wrapped modules: of DistributedDataParallel, torch.compile.
WRAPPERS = {"module", "_orig_mod"}


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """State dict under the names of the bare model, without the prefixes of compiled or distributed wrappers.

    Raises:
        ValueError: two entries with one name.
    """
    named = {}
    for name, value in state.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in named:
            raise ValueError(f"{name}: {bare} is there twice, with and without a wrapper")
        named[bare] = value
    return named


def read_official(path: str | Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """State dict of a published checkpoint, without its losses (``gan_losses.*``); the file stays mapped to memory.

    The file holds the entry that ``weights`` names, one ``state_dict`` (as Lightning writes), or the tensors
    themselves. Names are those of the bare model, see :func:`plain`.

    Args:
        weights: "ema" (what the published evaluation uses) or "model".

    Raises:
        CheckpointError: not such a file, a damaged one, or one that holds anything but tensors, plain containers and
            ``argparse.Namespace``, which is named.
        ValueError: another choice of weights.
        OSError: no file, or one that cannot be read.
    """
    check_choice("weights", weights, ("ema", "model"))
    content = torch_archive.load(path)
    try:
        return _state(content, weights, Path(path).stat().st_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _state(content: Any, weights: str, size: int) -> dict[str, Tensor]:
    """Tensors of a checkpoint's content by name, without its losses; at most ``size`` bytes."""
    if not isinstance(content, dict):
        raise CheckpointError(f"expected an entry {weights!r}, got a {type(content).__name__}")
    # By dict's own methods: an instance may hide its methods behind attributes.
    content = dict(dict.items(content))
    bare = any(isinstance(x, Tensor) for x in content.values())
    entry = next((x for x in (weights, "state_dict") if x in content), None)
    if entry is None and not bare:
        raise CheckpointError(f"expected an entry {weights!r}, got {some(content) or 'none'}")
    state = content if entry is None else content[entry]
    where = "" if entry is None else f" in {entry!r}"
    if not isinstance(state, dict):
        raise CheckpointError(f"expected tensors by name{where}, got a {type(state).__name__}")
    wrong = [
        f"{some([name])}: a {type(tensor).__name__}"
        for name, tensor in dict.items(state)
        if not isinstance(name, str) or not isinstance(tensor, Tensor)
    ]
    if wrong:
        raise CheckpointError(f"expected tensors by name{where}, got {some(wrong)}")
    kept = {
        name: tensor.detach()
        for name, tensor in plain(dict(dict.items(state))).items()
        if not name.startswith("gan_losses.")
    }
    if (taken := sum(x.numel() * x.element_size() for x in kept.values())) > size:
        raise CheckpointError(
            f"expected tensors of at most {size} bytes{where}, got {taken}: they share memory"
        )
    return kept


def infer_config(
    state: Mapping[str, Tensor], *, heads: int | None = None, **overrides: Any
) -> AdaptiveTokenizerConfig:
    """Configuration of a published state dict, from its shapes.

    Args:
        heads: of encoder and decoder; shapes do not tell. None: those of the named size with this width and depth.
        overrides: fields of the configuration, such as ``halting``; ``quirks`` are the published ones by default.

    Raises:
        CheckpointError: not the state dict of an adaptive tokenizer, or heads that are not known.
        ValueError: fields that do not fit together.
    """
    try:
        latents, width = state["latent_tokens"].shape
        decoder_width = state["decoder_positional_embedding"].shape[1]
        base = _infer_base(state)
        tokens = state["encoder_positional_embedding"].shape[0] - 1
        fields: dict[str, Any] = {
            "bottleneck": "continuous"
            if "decoder.decoder_embed.weight" in state
            else "unfactorized",
            "image_size": (round(tokens**0.5) * base.patch_size,) * 2,
            "latents_per_iteration": latents,
            "iterations": state["timestep_embedding"].shape[0],
            "code_dim": state["pre_quantizer_mlp.weight"].shape[0],
            "quirks": Quirks.official(),
        }
        if "quantize.embedding.weight" in state:
            fields["bottleneck"] = "quantized"
            fields["codebook_size"] = state["quantize.embedding.weight"].shape[0]
            fields["ema_decay"] = 0.99 if "quantize.cluster_size" in state else None
    except KeyError as error:
        raise CheckpointError(
            f"not the state of an adaptive tokenizer: {error} is missing, got {some(state) or 'nothing'}"
        ) from error
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        # Keys or shapes of another kind.
        raise CheckpointError(f"not the state of an adaptive tokenizer ({error})") from error
    fields["encoder"] = _infer_transformer(state, "encoder", width, heads)
    fields["decoder"] = _infer_transformer(state, "decoder", decoder_width, heads)
    return AdaptiveTokenizerConfig(base=base, **{**fields, **overrides})


def _infer_transformer(
    state: Mapping[str, Tensor], name: str, width: int, heads: int | None
) -> TransformerConfig:
    count = _count(state, f"{name}.transformer.")
    if heads is None:
        known = {(w, layers): h for w, layers, h in SIZES.values()}
        if (width, count) not in known:
            raise CheckpointError(
                f"heads: not known for width {width} and {count} layers; state them"
            )
        heads = known[width, count]
    return TransformerConfig(width, count, heads)


def _infer_base(state: Mapping[str, Tensor]) -> BaseConfig:
    kind = "vqgan" if any(key.startswith("base_tokenizer.vqgan.") for key in state) else "vae"
    prefix = f"base_tokenizer.{kind}."
    channels = state[f"{prefix}encoder.conv_in.weight"].shape[0]
    levels = _count(state, f"{prefix}encoder.down.")
    multipliers = tuple(
        state[f"{prefix}encoder.down.{level}.block.0.conv1.weight"].shape[0] // channels
        for level in range(levels)
    )
    layout: dict[str, Any] = {
        "channels": channels,
        "multipliers": multipliers,
        "blocks": _count(state, f"{prefix}encoder.down.0.block."),
    }
    if kind == "vqgan":
        codes, latents = state[f"{prefix}quantize.embedding.weight"].shape
        return VQGANConfig(latent_channels=latents, num_codes=codes, **layout)
    return KLVAEConfig(
        latent_channels=state[f"{prefix}post_quant_conv.weight"].shape[0],
        attention_levels=tuple(
            level
            for level in range(levels)
            if f"{prefix}encoder.down.{level}.attn.0.q.weight" in state
        ),
        **layout,
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different name components that follow ``prefix`` in the state's names: of layers behind "layers."."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
