"""Published checkpoints (``.pth``): state dicts as they are distributed, and the configuration that their shapes tell.

No code is ever executed: what a file names is held against an allow-list of tensors, plain containers and
``argparse.Namespace``, before torch's restricted unpickler reads it. No size that a file states is believed: entries
lie in it uncompressed, each once, tensors within their entries.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .checks import printable
from .config import (
    SIZES,
    AdaptiveTokenizerConfig,
    BaseConfig,
    KLVAEConfig,
    Quirks,
    TransformerConfig,
    VQGANConfig,
)
from .files import CheckpointError, reading

#: Instructions of a pickle, and bytes of a zip file's directory: several times those of any published checkpoint.
#: They bound what reading takes beside the tensors.
MAX_INSTRUCTIONS = 2**19
MAX_DIRECTORY = 2**23
#: What wraps a module puts its name before those of the parameters: DistributedDataParallel, torch.compile.
WRAPPERS = {"module", "_orig_mod"}

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {
    *("argparse Namespace", "collections OrderedDict", "__builtin__ set", "builtins set"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"),
    *(
        "torch device",
        "torch.storage UntypedStorage",
        *(f"torch {kind}Storage" for kind in _STORAGES),
    ),
    *(f"torch {name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
}


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of the bare model: those of compiled or distributed wrappers are left out.

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

    The file may hold the entries ``weights`` asks for, one ``state_dict`` (as Lightning writes), or the tensors
    themselves. Names are those of the bare model, see :func:`plain`.

    Args:
        weights: "ema" (what the published evaluation uses) or "model".

    Raises:
        CheckpointError: not such a file, a damaged one, or one that holds anything but tensors, plain containers and
            ``argparse.Namespace``, which is named.
        OSError: no file, or one that cannot be read.
    """
    with reading(path) as file:
        try:
            _check_archive(file)
            with torch.serialization.safe_globals([argparse.Namespace]):
                # Mapped, so that a storage is a part of the file, whatever size the pickle states.
                content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # Damaged instructions make the unpickler raise anything.
            raise CheckpointError(
                f"{path}: not a torch checkpoint, truncated or damaged ({_reason(error)})"
            ) from error
        size = file.seek(0, 2)
    try:
        return _state(content, weights, size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _reason(error: Exception) -> str:
    """In a line; torch goes on with how to load it all the same."""
    said = str(error).strip().rpartition("WeightsUnpickler error: ")[2].splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _check_archive(file: BinaryIO) -> None:
    """That nothing in a zip file of ``torch.save`` takes more memory than it has bytes, or names what is not allowed.

    Raises:
        CheckpointError: it does, or it is damaged; whatever ``zipfile`` raises.
    """
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError("expected a zip file, as torch.save writes since torch 1.6")
    size = file.seek(0, 2)
    if (directory := _directory_size(file)) > min(MAX_DIRECTORY, size):
        raise CheckpointError(
            f"expected a directory of at most {MAX_DIRECTORY} bytes, got {directory}"
        )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{printable(entry.filename)}: expected it uncompressed")
        if (stated := sum(entry.file_size for entry in entries)) > size:
            raise CheckpointError(f"expected entries of at most {size} bytes in all, got {stated}")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise CheckpointError("expected each entry once")
        pickles = [x for x in entries if x.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"expected one data.pkl, got {len(pickles)}")
        if (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"damaged: the checksum of {printable(damaged)} does not match")
        _check_pickle(archive.read(pickles[0]))


def _directory_size(file: BinaryIO) -> int:
    """Bytes of the directory of a zip file, from its last record; its layout is that of PKWARE's APPNOTE 4.3."""
    file.seek(-42, 2)
    locator, _, place, _ = struct.unpack("<4sLQL", file.read(20))
    signature, *_, size, _, comment = struct.unpack("<4s4H2LH", file.read(22))
    if signature != b"PK\x05\x06" or comment:
        raise CheckpointError("truncated, or something lies behind its end")
    if locator == b"PK\x06\x07":
        file.seek(place)
        size = struct.unpack("<4sQ2H2L4Q", file.read(56))[8]
    return size


def _check_pickle(pickled: bytes) -> None:
    named = set()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_INSTRUCTIONS:
            raise CheckpointError(f"expected at most {MAX_INSTRUCTIONS} instructions in data.pkl")
        if instruction.name == "PROTO" and argument != 2:
            raise CheckpointError(f"expected pickle protocol 2, torch.save's own, got {argument}")
        if instruction.name in ("GLOBAL", "INST"):
            named.add(str(argument))
    if refused := sorted(named - ALLOWED):
        raise CheckpointError(
            f"refused: it holds {_some(x.replace(' ', '.') for x in refused)}; allowed are tensors, plain containers "
            "and argparse.Namespace alone"
        )


def _state(content: Any, weights: str, size: int) -> dict[str, Tensor]:
    """The tensors that are asked for."""
    if not isinstance(content, dict):
        raise CheckpointError(f"expected an entry {weights!r}, got a {type(content).__name__}")
    # As a plain dict has them: an instance may hide its methods behind attributes.
    content = dict(dict.items(content))
    bare = content and all(isinstance(x, Tensor) for x in content.values())
    entry = next((x for x in (weights, "state_dict") if x in content), None)
    if entry is None and not bare:
        raise CheckpointError(f"expected an entry {weights!r}, got {_some(content) or 'none'}")
    state = content if entry is None else content[entry]
    where = "" if entry is None else f" in {entry!r}"
    if not isinstance(state, dict):
        raise CheckpointError(f"expected tensors by name{where}, got a {type(state).__name__}")
    wrong = [
        f"{_some([name])} of type {type(tensor).__name__}"
        for name, tensor in dict.items(state)
        if not isinstance(name, str) or not isinstance(tensor, Tensor)
    ]
    if wrong:
        raise CheckpointError(f"expected tensors by name{where}, got {_some(wrong)}")
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


def _some(names: Iterable[object]) -> str:
    """The first of some names, and how many more there are."""
    known = [x if isinstance(x, str) else f"a {type(x).__name__}" for x in names]
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return ", ".join(map(printable, known[:5])) + more


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
            f"not the state of an adaptive tokenizer: {error} is missing, got {_some(state) or 'nothing'}"
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
