"""Published checkpoints: conversion, and damaged or hostile .pth files."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import os
import pathlib
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, CheckpointError, Quirks
from alit.cli import app
from alit.published import infer_config, read_official
from tests.helpers.hostile import EXAMPLES, memory, mutated
from tests.helpers.models import VARIANTS, config, model
from tests.helpers.published import published


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_positional_embedding": torch.zeros(0, 32)},
        {"latent_tokens": torch.zeros(3)},
        {"base_tokenizer.vqgan.encoder.down.x.y": torch.zeros(1)},
        {"base_tokenizer.vqgan.encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
    ],
    ids=range(4),
)
def test_shapes_that_are_no_model(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"not the state of an adaptive tokenizer|expected a"):
        infer_config({**model("vqgan").state_dict(), **change}, heads=2)


@pytest.mark.parametrize("bottleneck", VARIANTS)
@pytest.mark.parametrize("base", ["vqgan", "vae"])
def test_convert(base: str, bottleneck: str, tmp_path: Path) -> None:
    source, target = tmp_path / "official.pth", tmp_path / "model.safetensors"
    original = published(source, base, bottleneck)
    done = CliRunner().invoke(app, ["convert", str(source), str(target), "--heads", "2"])
    assert done.exit_code == 0, done.output
    loaded = AdaptiveTokenizer.from_pretrained(target)
    assert loaded.config.quirks == Quirks.official()
    expected = config(base, bottleneck=bottleneck, image_size=(16, 16), quirks=Quirks.official())
    unused = {} if bottleneck == "quantized" else {"codebook_size": 4096}
    assert loaded.config == AdaptiveTokenizerConfig(**{**vars(expected), **unused})
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True)
    )
    done = CliRunner().invoke(
        app, ["convert", str(source), str(target), "--heads", "2", "--weights", "model"]
    )
    other = AdaptiveTokenizer.from_pretrained(target)
    torch.testing.assert_close(other.latent_tokens, original.latent_tokens + 1)


def test_convert_asks_for_heads_and_known_sizes_need_none(tmp_path: Path) -> None:
    source = tmp_path / "official.pth"
    published(source, "vqgan", "quantized")
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "x.safetensors")])
    assert done.exit_code == 1 and "heads: not known for width 32 and 2 layers" in " ".join(
        done.output.split()
    )
    with torch.device("meta"):
        state = AdaptiveTokenizer.from_size(
            "semilarge", base="vae", bottleneck="continuous"
        ).state_dict()
    wanted = AdaptiveTokenizerConfig.of_size(
        "semilarge", base="vae", bottleneck="continuous", compatibility="official"
    )
    assert infer_config(state) == wanted
    with pytest.raises(CheckpointError, match="'latent_tokens' is missing"):
        infer_config({"x": torch.zeros(1)})


class Executable:
    """Object whose pickle runs a command when an unsafe unpickler loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_executable_pickle_is_refused(tmp_path: Path) -> None:
    source, trace = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"ema": {"x": torch.zeros(1)}, "args": Executable(trace)}, source)
    with pytest.raises(CheckpointError, match="refused"):
        read_official(source)
    assert not trace.exists()
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out.safetensors")])
    assert done.exit_code == 1 and "refused" in done.output and not trace.exists()


GOOD = {"ema": collections.OrderedDict(a=torch.zeros(4), b=torch.ones(2, 3))}


def rebuilt(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: Any
) -> Path:
    """Write the zip file with entries changed by ``change`` and right checksums; returns ``target``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def with_pickle(path: Path, pickled: bytes) -> Path:
    torch.save(GOOD, path.with_name("good.pth"))
    return rebuilt(
        path.with_name("good.pth"),
        path,
        lambda name, old: pickled if name.endswith("data.pkl") else old,
    )


def refused(path: Path, message: str) -> None:
    """Check that the file raises CheckpointError with this message, in little memory and time."""
    most = 100 * 2**20 + path.stat().st_size
    with memory(most, seconds=10), pytest.raises(CheckpointError, match=message):
        read_official(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"ema": {f"module.{name}": x for name, x in state.items()}},
        lambda state: {"ema": {f"_orig_mod.module.{name}": x for name, x in state.items()}},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: state,
        lambda state: {f"module.{name}": torch.nn.Parameter(x) for name, x in state.items()},
    ],
    ids=["distributed", "compiled", "lightning", "bare", "parameters"],
)
def test_layouts(wrap: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    state = {**model("vqgan").state_dict(), "gan_losses.module.x": torch.zeros(1)}
    torch.save(wrap(state), tmp_path / "x.pth")
    found = read_official(tmp_path / "x.pth")
    del state["gan_losses.module.x"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pathlib.PurePosixPath("x"), r"refused: it holds pathlib\.PurePosixPath; allowed"),
        (np.float64(1), r"numpy\._core\.multiarray\.scalar|numpy\.core\.multiarray\.scalar"),
        (np.zeros(3), r"numpy\.dtype"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (collections.Counter("x"), r"collections\.Counter"),
        (torch.zeros(2, 2).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
        (torch.zeros(2, dtype=torch.complex64), r"torch\.ComplexFloatStorage"),
        (torch.zeros(2, device="meta"), r"_rebuild_meta_tensor_no_storage"),
        (bytearray(3), r"bytearray"),
    ],
)
def test_what_is_refused_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save({**GOOD, "args": argparse.Namespace(x=content)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected an entry 'ema', got a list"),
        ({"model": {}}, "expected an entry 'ema', got model"),
        ({"ema": None}, "expected tensors by name in 'ema', got a NoneType"),
        ({"ema": [1]}, "expected tensors by name in 'ema', got a list"),
        (torch.zeros(1), "expected an entry 'ema', got a Tensor"),
        ({}, "expected an entry 'ema', got none"),
        ({"ema": {1: torch.zeros(1)}}, "expected tensors by name in 'ema', got a key of type int"),
        ({"ema": {"x": 1}}, "expected tensors by name in 'ema', got x: a int"),
        ({"x": torch.zeros(1), "epoch": 3}, "expected tensors by name, got epoch: a int"),
        ({"ema": {"x": torch.zeros(1), "module.x": torch.zeros(1)}}, "module.x: x is there twice"),
        ({"ema": dict.fromkeys("abcdef", torch.zeros(9999))}, "they share memory"),
        ({"ema": {"x": torch.zeros(1).expand(2**20, 2**20)}}, "they share memory"),
    ],
    ids=range(12),
)
def test_content_of_another_kind(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


def test_archives_of_another_kind_and_damaged_ones(tmp_path: Path) -> None:
    path, bomb = tmp_path / "x.pth", tmp_path / "bomb.pth"
    torch.save({"ema": {"x": torch.zeros(50_000_000)}}, path)
    rebuilt(path, bomb, lambda _, old: old, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    refused(bomb, "expected it uncompressed")
    torch.save(GOOD, path, _use_new_zipfile_serialization=False)
    refused(path, "expected a zip file, as torch.save writes since torch 1.6")
    torch.save(GOOD, path, pickle_protocol=4)
    refused(path, "expected pickle protocol 2, torch.save's own, got 4")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    refused(path, "expected it uncompressed")
    torch.save({"ema": {"x": torch.full((100,), 0.1)}}, path)
    good = path.read_bytes()
    for data, message in (
        (good + b"more", "truncated, or something lies behind its end"),
        (good[:700], "x.pth: "),
        (good[:3], "x.pth: "),
        (b"not a checkpoint", "expected a zip file"),
        (good.replace(struct.pack("<f", 0.1) * 9, bytes(36), 1), "checksum of .*data/0 does not m"),
    ):
        path.write_bytes(data)
        refused(path, message)


class Crafted:
    """Object that pickles as a tensor with a storage, both with arbitrary claims of sizes."""

    def __init__(
        self,
        elements: Any = 4,
        size: tuple[int, ...] = (4,),
        stride: tuple[int, ...] = (1,),
        offset: int = 0,
        key: str = "0",
    ) -> None:
        self.storage = ("storage", torch.FloatStorage, key, "cpu", elements)
        self.rest = (offset, size, stride, False, collections.OrderedDict())

    def pickled(self) -> bytes:
        class Storage:
            pass

        class Tensor:
            def __reduce__(inner) -> Any:
                return torch._utils._rebuild_tensor_v2, (Storage(), *self.rest)

        class Pickler(pickle.Pickler):
            def persistent_id(inner, thing: object) -> Any:
                return self.storage if isinstance(thing, Storage) else None

        file = io.BytesIO()
        Pickler(file, protocol=2).dump({"ema": {"a": Tensor()}})
        return file.getvalue()


@pytest.mark.parametrize(
    "crafted",
    [
        Crafted(elements=10**10, size=(10**10,)),
        Crafted(size=(10**9,)),
        Crafted(elements=0, size=(10**9,)),
        Crafted(size=(10**6, 10**6), stride=(0, 0)),
        Crafted(size=(2**62, 4), stride=(1, 1)),
        Crafted(size=(-1,)),
        Crafted(stride=(-1,)),
        Crafted(offset=-1),
        Crafted(offset=10**9),
        Crafted(elements=-4),
        Crafted(elements="4"),
        Crafted(key="1000"),
        Crafted(key="../data.pkl"),
    ],
    ids=range(13),
)
def test_tensors_beyond_their_storage(crafted: Crafted, tmp_path: Path) -> None:
    refused(with_pickle(tmp_path / "x.pth", crafted.pickled()), "x.pth: ")


DOUBLED = b"".join(b"h%ch%c\x86q%ca" % (i, i, i + 1) for i in range(60))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"]" * 100_000, "expected an entry 'ema', got a list"),
        (b"]" * 5_000_000, "expected at most 524288 instructions"),
        (b"ccollections\nOrderedDict\nq\x00" + b"h\x00)R" * 50_000, "expected an entry 'ema'"),
        (b"]" + b"".join(b"r" + struct.pack("<I", 7919 * i) for i in range(100_000)), "got a list"),
        (b"(" * 200_000 + b"t" * 200_000, "expected tuples of at most 1000 values"),
        (b"X\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
        (b"ctorch\nFloatTensor\nJ\x00\x00\x00\x7f\x85R", "refused: it holds torch.FloatTensor"),
        (b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R", "refused: .* __builtin__.bytearray"),
        # Nested tuples that each hold the one before twice: 2^60 values if expanded, and a key.
        (b"]K\x01\x85q\x00a" + DOUBLED + b"}h\x3cK\x01s", "expected tuples of at most 1000"),
        (b"]K\x01\x85q\x00a" + DOUBLED.replace(b"\x86", b"K\x00\x87"), "tuples of at most 1000"),
    ],
    ids=range(10),
)
def test_pickles_that_ask_for_memory(body: bytes, message: str, tmp_path: Path) -> None:
    refused(with_pickle(tmp_path / "x.pth", b"\x80\x02" + body + b"."), message)


def damaged_pickle(pickled: bytes, rng: random.Random) -> bytes:
    """Pickle with mutated bytes, or with whole instructions removed, doubled, moved or given another argument."""
    if rng.random() < 0.5:
        return mutated(pickled, rng)
    begins = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    parts = [pickled[a:b] for a, b in itertools.pairwise(begins)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(1, len(parts) - 1), rng.randrange(1, len(parts) - 1)
        match rng.randrange(4):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, parts[other])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case _:
                parts[at] = parts[at][:1] + mutated(parts[at][1:], rng)
    return b"".join(parts)


def test_damaged_files_of_all_kinds(tmp_path: Path) -> None:
    """Damage of the file, or of its pickle with right checksums, raises CheckpointError at once in little memory."""
    rng, good, path = random.Random(0), tmp_path / "good.pth", tmp_path / "x.pth"
    state = model("vqgan").state_dict()
    torch.save({"ema": {name: x.flatten()[:1] for name, x in state.items()}, **GOOD}, good)
    whole = good.read_bytes()

    def changed(name: str, old: bytes) -> bytes:
        return damaged_pickle(old, rng) if name.endswith(".pkl") else old

    for _ in range(EXAMPLES):
        if rng.random() < 0.3:
            path.write_bytes(mutated(whole, rng))
        else:
            rebuilt(good, path, changed)
        with memory(100 * 2**20, seconds=5), contextlib.suppress(CheckpointError):
            infer_config(read_official(path), heads=2)
