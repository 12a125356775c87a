"""Own and published checkpoints: round trips, and everything that can be wrong with a file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from alit import AdaptiveTokenizer, CheckpointError, FixedLength
from alit.checkpoint import load_state

from .models import BASES, images, model


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
