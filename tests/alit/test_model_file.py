"""Model files of our format: round trips, and damaged files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from alit import AdaptiveTokenizer, CheckpointError, FixedLength, TransformerConfig
from alit.model_file import load_state, read, write
from tests.helpers.hostile import EXAMPLES, full_disk, memory, mutated
from tests.helpers.hostile_json import mutated_json
from tests.helpers.models import BASES, images, model

#: Memory allowed in bytes beyond the tensors.
LITTLE = 100 * 2**20


@pytest.mark.parametrize("base", BASES)
def test_round_trip(base: str, tmp_path: Path) -> None:
    original, path = model(base), tmp_path / "model.safetensors"
    original.save_pretrained(path)
    loaded = AdaptiveTokenizer.from_pretrained(path)
    assert loaded.config == original.config and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True)
    )
    tokens = original.encode(images(), FixedLength(6))
    assert torch.equal(loaded.encode(images(), FixedLength(6)).rows, tokens.rows)
    assert torch.equal(loaded.decode(tokens), original.decode(tokens))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_keys_are_listed(tmp_path: Path) -> None:
    state = model().state_dict()
    state.pop("patch_embed.bias")
    state["surplus"] = torch.zeros(1)
    state["latent_tokens"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        load_state(model(), state)
    message = str(caught.value)
    assert "missing patch_embed.bias" in message and "unexpected surplus" in message
    assert "latent_tokens has shape (2, 2), expected (3, 32)" in message and "3 problems" in message


def test_a_model_too_large_for_its_file_takes_no_memory() -> None:
    own = model()
    AdaptiveTokenizer.from_state(own.config, own.state_dict())  # the first one imports much
    huge = replace(own.config, iterations=2**16, latents_per_iteration=2**16)
    with memory(LITTLE), pytest.raises(CheckpointError, match="missing timestep_embedding"):
        AdaptiveTokenizer.from_state(huge, {})


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model().save_pretrained(path)
    content, one = path.read_bytes(), {"x": torch.zeros(1)}
    truncated = "x.safetensors: not a safetensors file, or truncated"
    for damaged, message in (
        (content[: len(content) // 2], truncated),
        (b"", truncated),
        (os.urandom(4096), truncated),
        (b"\xff" * 8 + content[8:], truncated),
        (safetensors.torch.save(one), "expected format 'alit-1'"),
        (safetensors.torch.save(one, {"format": "alit-1"}), "configuration"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            AdaptiveTokenizer.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="no such file, nor the name of shipped weights"):
        AdaptiveTokenizer.from_pretrained("nano-vqgan")


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """If writing a model fails in the middle, with files limited to 20 kB, the old file stays intact."""
    path = tmp_path / "model.safetensors"
    model().save_pretrained(path)
    before = path.read_bytes()
    assert len(before) > 20000
    with full_disk(20000), pytest.raises(OSError, match="what was there before is intact"):
        model(seed=1).save_pretrained(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_round_trip(stored: torch.dtype, tmp_path: Path) -> None:
    """Half-precision models are read as float32 with equal values; tensors of mixed dtypes are aligned in a file."""
    original, path = model().to(stored), tmp_path / "x.safetensors"
    original.save_pretrained(path)
    loaded = AdaptiveTokenizer.from_pretrained(path)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())
    mixed = {"a": torch.ones(3, dtype=stored), "b": torch.ones(2), "c": torch.zeros(0, 3)}
    write(path, original.config, {**mixed, "d": mixed["b"]})  # shared: stored twice
    found = safetensors.torch.load_file(path)
    assert found.keys() == {"a", "b", "c", "d"} and found["c"].shape == (0, 3)
    assert all(torch.equal(found[name], tensor) for name, tensor in mixed.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "alit-1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    m, path = model(), tmp_path / "x.safetensors"
    state = {**m.state_dict(), "latent_tokens": m.latent_tokens.detach().to(dtype)}
    with pytest.raises(TypeError, match=f"latent_tokens: expected torch.float32, .*got {dtype}"):
        write(path, m.config, state)
    with pytest.raises(CheckpointError, match=f"latent_tokens is {dtype}, expected torch.float32"):
        AdaptiveTokenizer.from_state(m.config, state)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    m = model()
    m.latent_tokens.data[1, 2] = value
    with pytest.raises(CheckpointError, match="latent_tokens has values that are NaN or infinite"):
        AdaptiveTokenizer.from_state(m.config, m.state_dict())


class Wrapped(torch.nn.Module):
    """Module that prefixes parameter names with ``module.`` like DistributedDataParallel."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models_are_saved_under_plain_names(tmp_path: Path) -> None:
    plain, path = model(), tmp_path / "x.safetensors"
    within = model()
    within.encoder = torch.compile(within.encoder)  # type: ignore[assignment]
    within.decoder.transformer[0] = torch.compile(within.decoder.transformer[0])
    assert any("_orig_mod" in name for name in within.state_dict())
    torch.compile(model()).save_pretrained(path)
    compiled = path.read_bytes()
    within.save_pretrained(path)
    assert path.read_bytes() == compiled and within.identity() == plain.identity()
    for wrapped in (Wrapped(plain), torch.compile(Wrapped(plain)), Wrapped(torch.compile(plain))):
        write(path, plain.config, wrapped.state_dict())
        assert path.read_bytes() == compiled
    assert AdaptiveTokenizer.from_pretrained(path).identity() == plain.identity()
    with pytest.raises(ValueError, match=r"module\.x: x is there twice"):
        write(path, plain.config, {"x": torch.zeros(1), "module.x": torch.zeros(1)})


def with_header(data: bytes, change: Callable[[str], str]) -> bytes:
    """Content of a safetensors file with its header changed by ``change``."""
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def with_config(data: bytes, change: Callable[[str], str]) -> bytes:
    def of_header(text: str) -> str:
        header = json.loads(text)
        header["__metadata__"]["config"] = change(header["__metadata__"]["config"])
        return json.dumps(header)

    return with_header(data, of_header)


def small_file(base: str, folder: Path) -> bytes:
    one = TransformerConfig(32, 1, 2)
    model(base, encoder=one, decoder=one).save_pretrained(folder / "small.safetensors")
    return (folder / "small.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"encoder": {"width": 32, "layers": 10**5, "heads": 2}},
            "encoder.layers: expected an integer in",
        ),
        ({"encoder": {"width": 32, "layers": 128, "heads": 2}}, r"encoder.transformer.1.ln_1.weig"),
        (
            {"decoder": {"width": 10**9, "layers": 1, "heads": 1}},
            "decoder.width: expected an integer in",
        ),
        ({"decoder": {"width": 2**16, "layers": 1, "heads": 1}}, "decoder_positional_embedding: e"),
        ({"iterations": 10**6}, "iterations: expected an integer in"),
        ({"iterations": 2**16}, "timestep_embedding: expected shape"),
        ({"image_size": [10**6, 10**6]}, "image_size: expected an integer in"),
        ({"image_size": [2**15, 2**15]}, "encoder_positional_embedding: expected shape"),
        ({"codebook_size": 10**12}, "codebook_size: expected an integer in"),
        ({"codebook_size": 2**31 - 1}, "quantize.embedding.weight: expected shape"),
        ({"code_dim": 2**16}, "pre_quantizer_mlp.weight: expected shape"),
        ({"latents_per_iteration": 2**16}, "latent_tokens: expected shape"),
        (
            {"base": {"kind": "vqgan", "num_codes": 10**12}},
            "base.num_codes: expected an integer in",
        ),
        ({"base": {"kind": "vqgan", "multipliers": [1] * 10**5}}, "JSON of at most|multipliers"),
        (
            {"base": {"kind": "vae", "multipliers": [1] * 9}},
            "base.multipliers: .* at most 8, got 9",
        ),
        ({"base": {"kind": "dct", "patch_size": 10**6}}, "base.patch_size: expected an integer in"),
    ],
    ids=range(16),
)
def test_configurations_of_larger_models(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Configurations of larger models raise CheckpointError before modules of that size are made, even on meta."""
    path = tmp_path / "x.safetensors"
    data = small_file("dct", tmp_path)
    path.write_bytes(with_config(data, lambda text: json.dumps({**json.loads(text), **fields})))
    with memory(LITTLE, seconds=1), pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("base", BASES)
def test_damaged_headers(base: str, tmp_path: Path) -> None:
    """Damaged bytes, headers or configurations raise CheckpointError at once, or give a model as large as the file."""
    rng, path = random.Random(base), tmp_path / "x.safetensors"
    good = small_file(base, tmp_path)
    AdaptiveTokenizer.from_pretrained(tmp_path / "small.safetensors")  # the first one imports much
    for _ in range(EXAMPLES // 3):
        kind = rng.choice((mutated, with_header, with_config, with_config))
        changed = (
            mutated(good, rng) if kind is mutated else kind(good, lambda x: mutated_json(x, rng))
        )
        path.write_bytes(changed)
        with memory(LITTLE + len(changed), seconds=5), contextlib.suppress(CheckpointError):
            AdaptiveTokenizer.from_pretrained(path)


@pytest.mark.parametrize("size", [0, 7, 8, 2**22 + 1, 2**40])
def test_headers_longer_than_their_file(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}" if size else b"")
    os.truncate(path, max(2, min(size, 2**35)))  # without a byte on the disk
    with memory(LITTLE), pytest.raises(CheckpointError, match="not a safetensors file, or t"):
        read(path)
