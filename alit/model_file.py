"""Own model files: safetensors, with the configuration in the metadata. Published ones: ``published.py``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from . import hub
from .atomic_files import reading, replacing
from .checks import CheckpointError, printable, shown
from .config import AdaptiveTokenizerConfig
from .published import plain
from .shipped import find

FORMAT = "alit-1"
#: Most bytes of a header, several times that of the largest model; bounds what reading takes beside the tensors.
MAX_HEADER = 2**22
#: Dtypes of weights, and their names in a file.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHIPPED = Path(__file__).parent / "weights"


def resolve(path_or_name: str | Path, revision: str | None = None) -> Path:
    """Path of a model file, given as a path, the name of shipped weights, or a repository ``owner/name`` on the Hub.

    If several match, the first of these is taken. A ``Path`` names no repository.

    Args:
        revision: of the repository: branch, tag or commit; None: ``main``.

    Raises:
        FileNotFoundError: none of them; the message lists the shipped names and suggests the nearest.
        CheckpointError: what came from the Hub, or lay in its cache, is cut off or no safetensors; it is removed.
        ValueError: a revision of something else.
        OSError: as :func:`alit.hub.fetch`.
    """
    name = str(path_or_name)
    here = Path(name).exists() or (SHIPPED / f"{name}.safetensors").is_file()
    if here or not hub.is_name(path_or_name):
        if revision is not None:
            raise ValueError(f"revision: expected owner/name on the Hub with it, got {name}")
        return find(path_or_name, SHIPPED, ".safetensors", "shipped weights")
    path = hub.fetch(name, revision)
    try:
        check_whole(path)
    except CheckpointError as error:
        hub.discard(path)
        again = "it is no longer in the cache, so that it is fetched anew"
        raise CheckpointError(f"{name}: {error}; {again}") from error
    return path


def write(path: str | Path, config: AdaptiveTokenizerConfig, state: Mapping[str, Tensor]) -> None:
    """Write configuration and state, under the names of the bare model (see :func:`plain`), in place of an old file.

    Raises:
        TypeError, OSError: as :func:`write_tensors`.
    """
    write_tensors(path, {"format": FORMAT, "config": config.to_json()}, plain(state))


def write_tensors(
    path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write a safetensors file in place of an old one. (The library's own writer leaves another temporary file behind
    when it is killed.)

    Raises:
        TypeError: a tensor that is not float32, float16 or bfloat16.
        OSError: the file cannot be written; what was there before is intact.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # The widest elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(_bytes(tensors[name]))
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error}); what was there before is intact"
        ) from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State with float32 tensors in float16, unless values exceed its range (such as counts of a moving average)."""
    smaller = {name: x.half() if x.dtype == torch.float32 else x for name, x in state.items()}
    for name, tensor in state.items():
        if tensor.isfinite().all() and not smaller[name].isfinite().all():
            smaller[name] = tensor
    return smaller


def read(path: Path) -> tuple[AdaptiveTokenizerConfig, dict[str, Tensor]]:
    """Configuration and state of a file written by :func:`write`; the state stays in the file, mapped to memory.

    Raises:
        CheckpointError: no such file, a damaged one, a configuration of other tensors.
        OSError: no file, or one that cannot be read.
    """
    with opened(path, FORMAT) as (file, described):
        config = AdaptiveTokenizerConfig.from_json(described)
        names = list(file.keys())
        check_sizes(config, {name: file.get_slice(name).get_shape() for name in names})
        return config, {name: file.get_tensor(name) for name in names}


@contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[Any, str]]:
    """Context manager: an open safetensors file of format ``kind``, and the configuration in its metadata, as text; no
    tensor is in memory yet.

    Raises:
        CheckpointError: no such file, or a damaged one; any ``ValueError`` within, named after the file.
        OSError: no file, or one that cannot be read.
    """
    check_whole(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if (found := metadata.get("format")) != kind:
                raise CheckpointError(
                    f"expected format {kind!r} in the metadata, got {shown(found)}"
                )
            yield file, metadata.get("config", "")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_whole(path: Path) -> None:
    """Check that a file is safetensors, with a header of at most ``MAX_HEADER`` bytes, and as long as this says.

    Raises:
        CheckpointError: a file that is not.
        OSError: no file, or one that cannot be read.
    """
    with reading(path) as opened:
        length, size = int.from_bytes(opened.read(8), "little"), opened.seek(0, 2)
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: a header of {length} bytes, {size} bytes in all"
        )
    try:
        with safetensors.safe_open(str(path), framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({error})") from error


def check_sizes(config: AdaptiveTokenizerConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a configuration fits tensors of these shapes, as far as can be told before its model is built.

    Raises:
        CheckpointError: a configuration of other sizes, or of more layers.
    """
    encoder, decoder, base = config.encoder, config.decoder, config.base
    latents, tokens = config.latents_per_iteration, 1 + math.prod(config.grid)
    expected: dict[str, tuple[int, ...]] = {
        "latent_tokens": (latents, encoder.width),
        "timestep_embedding": (config.iterations, latents, encoder.width),
        "encoder_positional_embedding": (tokens, encoder.width),
        "decoder_positional_embedding": (tokens, decoder.width),
        "patch_embed.weight": (encoder.width - base.latent_channels, 3, *[base.patch_size] * 2),
        "pre_quantizer_mlp.weight": (config.code_dim, encoder.width),
    }
    if config.bottleneck == "quantized":
        own = [f"quantize.{i}" for i in range(config.iterations)]
        for codebook in own if config.codebooks == "each" else ["quantize"]:
            expected[f"{codebook}.embedding.weight"] = config.codebook_size, config.code_dim
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        for layer in range(part.layers):
            expected[f"{name}.transformer.{layer}.ln_1.weight"] = (part.width,)
    for name, shape in expected.items():
        found = tuple(shapes[name]) if name in shapes else "none"
        if found != shape:
            raise CheckpointError(
                f"{name}: expected shape {shape} of the configuration, got {found}"
            )


def fingerprint(config: AdaptiveTokenizerConfig, state: Mapping[str, Tensor]) -> bytes:
    """Fingerprint of a model: 16 bytes that change with every weight, its dtype, and every field of the configuration
    that is not at its default; but for the length head and ``any_length``, which do not change what tokens mean.

    Fields at their default do not count, so that a later version's new fields leave old fingerprints as they are.
    """
    config = dataclasses.replace(config, any_length=False, length_head=False)
    digest = hashlib.sha256(json.dumps(_stated(config), sort_keys=True).encode())
    for name, tensor in sorted(plain(state).items()):
        if name.startswith("length_head."):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.digest()[:16]


def _stated(config: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not at their default, in nested dataclasses too; ``kind`` always."""
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
    """Check that a state dict fits a model, which may be on the meta device.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys; weights that are not float32, float16 or bfloat16, NaN
            or infinite. The message lists them.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {printable(name)}" for name in state if name not in own]
    for name in filter(state.__contains__, own):
        expected, given = own[name], state[name]
        dtypes = tuple(DTYPES) if expected.dtype in DTYPES else (expected.dtype,)
        if given.shape != expected.shape:
            problems.append(
                f"{name} has shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
            )
        elif given.dtype not in dtypes:
            problems.append(f"{name} is {given.dtype}, expected {', '.join(map(str, dtypes))}")
        elif not _finite(given):
            problems.append(f"{name} has values that are NaN or infinite")
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise CheckpointError(
            f"checkpoint does not fit the model, {len(problems)} problems:\n  {shown}"
        )


def _finite(tensor: Tensor) -> bool:
    """True if all values are finite; makes no copy, or mask, of the tensor."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(x.isfinite()) for x in tensor.aminmax())
