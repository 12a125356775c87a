"""Own and published checkpoints: round trips, and everything that can be wrong with a file."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from alit import AdaptiveTokenizer, AdaptiveTokenizerConfig, CheckpointError, FixedLength, Quirks
from alit.checkpoint import infer_config, load_state, read_official
from alit.cli import app

from .models import BASES, VARIANTS, config, images, model


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
    """In a process of its own: what fills memory with NaN for the tests does not look at the device."""
    huge = replace(model().config, iterations=2**16).to_json()
    code = (
        "import sys; from alit import *; config = AdaptiveTokenizerConfig.from_json(sys.argv[1])\n"
    )
    code += "try: AdaptiveTokenizer.from_state(config, {})\n"
    code += "except CheckpointError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code, huge], capture_output=True, text=True)
    assert "missing timestep_embedding" in done.stdout, done.stderr


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


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model().save_pretrained(path)
    content = path.read_bytes()
    for name, damaged in (
        ("truncated", content[: len(content) // 2]),
        ("empty", b""),
        ("garbage", os.urandom(4096)),
        ("header", b"\xff" * 8 + content[8:]),
    ):
        broken = tmp_path / f"{name}.safetensors"
        broken.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            AdaptiveTokenizer.from_pretrained(broken)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="expected format 'alit-1'"):
        AdaptiveTokenizer.from_pretrained(other)
    safetensors.torch.save_file({"x": torch.zeros(1)}, other, metadata={"format": "alit-1"})
    with pytest.raises(CheckpointError, match="configuration"):
        AdaptiveTokenizer.from_pretrained(other)
    with pytest.raises(FileNotFoundError, match="no such file, nor the name of shipped weights"):
        AdaptiveTokenizer.from_pretrained("nano-vqgan")


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from tests.alit.models import model
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    model(seed=1).save_pretrained(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Files of this process may not exceed 20 kB: writing the model fails in the middle."""
    path = tmp_path / "model.safetensors"
    model().save_pretrained(path)
    before = path.read_bytes()
    assert len(before) > 20000
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "what was there before is intact" in done.stdout
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_unwritable_directory(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        model().save_pretrained(tmp_path / "missing" / "model.safetensors")


def published(path: Path, base: str, bottleneck: str) -> AdaptiveTokenizer:
    """A file in the published layout: ema and model differ, args is a Namespace, losses are on board."""
    original = model(base, bottleneck=bottleneck, image_size=(16, 16))
    ema = {**original.state_dict(), "gan_losses.0.discriminator.main.0.weight": torch.zeros(3)}
    torch.save(
        {
            "model": {name: value + 1 for name, value in ema.items()},
            "ema": ema,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 7,
            "args": argparse.Namespace(model="alit_tiny", lr=1e-4),
        },
        path,
    )
    return original


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
    """Runs a command when a careless unpickler loads it."""

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


def test_what_is_no_published_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        read_official(path)
    published(path, "vqgan", "quantized")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        read_official(path)
    for state in (None, [1], {1: torch.zeros(1)}, {"x": 1}):
        torch.save({"ema": state}, path)
        with pytest.raises(CheckpointError, match="expected tensors by name"):
            read_official(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="expected an entry 'ema', got model"):
        read_official(path)
