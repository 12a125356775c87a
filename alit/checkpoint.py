"""Checkpoints: own files (safetensors, configuration in the metadata) and published ones (``.pth``).

No code is ever executed: published files are read by torch's restricted unpickler, which admits tensors, plain
containers and ``argparse.Namespace``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import (
    SIZES,
    AdaptiveTokenizerConfig,
    BaseConfig,
    KLVAEConfig,
    Quirks,
    TransformerConfig,
    VQGANConfig,
)
from .files import replacing

FORMAT = "alit-1"
SHIPPED = Path(__file__).parent / "weights"


class CheckpointError(ValueError):
    """A file that is not a checkpoint, is damaged, or does not fit the model."""


def resolve(path_or_name: str | Path) -> Path:
    """The file of a path or of the name of shipped weights.

    Raises:
        FileNotFoundError: neither; the message lists the shipped names and suggests the nearest.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    if str(path_or_name) in shipped:
        return SHIPPED / f"{path_or_name}.safetensors"
    near = difflib.get_close_matches(str(path_or_name), shipped, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"{path_or_name}: no such file, nor the name of shipped weights ({', '.join(shipped)}){hint}"
    )


def write(path: str | Path, config: AdaptiveTokenizerConfig, state: Mapping[str, Tensor]) -> None:
    """Write state and configuration to a new file beside ``path``, then move it there in one step."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": FORMAT, "config": config.to_json()}
    try:
        with replacing(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"{path}: could not be written ({error}); what was there before is intact"
        ) from error


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 tensors in float16, but for those with values beyond its range (such as counts of a moving average)."""
    smaller = {name: x.half() if x.dtype == torch.float32 else x for name, x in state.items()}
    for name, tensor in state.items():
        if tensor.isfinite().all() and not smaller[name].isfinite().all():
            smaller[name] = tensor
    return smaller


def read(path: Path) -> tuple[AdaptiveTokenizerConfig, dict[str, Tensor]]:
    """Configuration and state of a file written by :func:`write`."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r} in the metadata, got {metadata.get('format')!r}"
        )
    try:
        return AdaptiveTokenizerConfig.from_json(metadata.get("config", "")), state
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def fingerprint(config: AdaptiveTokenizerConfig, state: Mapping[str, Tensor]) -> bytes:
    """16 bytes that change with every weight, its dtype, and every field of the configuration that is not at its
    default.

    Fields at their default do not count, so that a later version's new fields leave old fingerprints as they are.
    """
    digest = hashlib.sha256(json.dumps(_stated(config), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:16]


def _stated(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default; dataclasses within it likewise, but ``kind`` always."""
    stated = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = _stated(value)
            default: Any = {}
        else:
            default = field.default
        if value != default or field.name == "kind":
            stated[field.name] = value
    return stated


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict; raises as :func:`check_state`."""
    check_state(model, state)
    model.load_state_dict(dict(state))


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """That a state dict is one of this model, which may be on the meta device.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys; the message lists them.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise CheckpointError(
            f"checkpoint does not fit the model, {len(problems)} problems:\n  {shown}"
        )


def read_official(path: str | Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """State dict of a published checkpoint, without its losses (``gan_losses.*``).

    Args:
        weights: "ema" (what the published evaluation uses) or "model".

    Raises:
        CheckpointError: not such a file, or one that holds anything executable.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What torch says goes on with how to load it all the same.
        match = re.search(r"GLOBAL ([\w.]+)|Unsupported \w+: ([\w.]+)", str(error))
        named = f" ({match[1] or match[2]})" if match else ""
        raise CheckpointError(
            f"{path}: refused, no torch checkpoint of tensors and argparse.Namespace alone{named}"
        ) from error
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a torch checkpoint, or truncated ({reason})") from error
    if not isinstance(content, dict) or weights not in content:
        found = (
            ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        )
        raise CheckpointError(f"{path}: expected an entry {weights!r}, got {found}")
    state = content[weights]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path}: expected tensors by name in {weights!r}")
    return {name: tensor for name, tensor in state.items() if not name.startswith("gan_losses.")}


def infer_config(
    state: Mapping[str, Tensor], *, heads: int | None = None, **overrides: Any
) -> AdaptiveTokenizerConfig:
    """Configuration of a published state dict, from its shapes.

    Args:
        heads: of encoder and decoder; shapes do not tell. None: those of the named size with this width and depth.
        overrides: fields of the configuration, such as ``halting``; ``quirks`` are the published ones by default.

    Raises:
        CheckpointError: not the state dict of an adaptive tokenizer, or heads that are not known.
    """
    try:
        latents, width = state["latent_tokens"].shape
        iterations = state["timestep_embedding"].shape[0]
        tokens = state["encoder_positional_embedding"].shape[0] - 1
        quantized, factorised = (
            "quantize.embedding.weight" in state,
            "decoder.decoder_embed.weight" in state,
        )
        base = _infer_base(state)
        side = round(tokens**0.5) * base.patch_size
        fields: dict[str, Any] = {
            "encoder": _infer_transformer(state, "encoder", width, heads),
            "decoder": _infer_transformer(
                state, "decoder", state["decoder_positional_embedding"].shape[1], heads
            ),
            "bottleneck": "quantized"
            if quantized
            else "continuous"
            if factorised
            else "unfactorised",
            "image_size": (side, side),
            "latents_per_iteration": latents,
            "iterations": iterations,
            "code_dim": state["pre_quantizer_mlp.weight"].shape[0],
            "quirks": Quirks.official(),
        }
        if quantized:
            fields["codebook_size"] = state["quantize.embedding.weight"].shape[0]
            fields["ema_decay"] = 0.99 if "quantize.cluster_size" in state else None
    except KeyError as error:
        raise CheckpointError(
            f"not the state of an adaptive tokenizer: {error} is missing"
        ) from error
    except CheckpointError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        # Keys or shapes of another kind.
        raise CheckpointError(f"not the state of an adaptive tokenizer ({error})") from error
    return AdaptiveTokenizerConfig(base=base, **{**fields, **overrides})


def _infer_transformer(
    state: Mapping[str, Tensor], name: str, width: int, heads: int | None
) -> TransformerConfig:
    pattern = re.compile(rf"{name}\.transformer\.(\d+)\.")
    count = 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=-1)
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
    levels = 1 + max(
        int(key.split(".")[4]) for key in state if key.startswith(f"{prefix}encoder.down.")
    )
    blocks = 1 + max(
        int(key.split(".")[6]) for key in state if key.startswith(f"{prefix}encoder.down.0.block.")
    )
    multipliers = tuple(
        state[f"{prefix}encoder.down.{level}.block.0.conv1.weight"].shape[0] // channels
        for level in range(levels)
    )
    if kind == "vqgan":
        codes, latent_channels = state[f"{prefix}quantize.embedding.weight"].shape
        return VQGANConfig(
            latent_channels=latent_channels,
            num_codes=codes,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
        )
    return KLVAEConfig(
        latent_channels=state[f"{prefix}post_quant_conv.weight"].shape[0],
        channels=channels,
        multipliers=multipliers,
        blocks=blocks,
        attention_levels=tuple(
            level
            for level in range(levels)
            if f"{prefix}encoder.down.{level}.attn.0.q.weight" in state
        ),
    )
