"""Two processes on the CPU under torchrun: they train as one does, survive a killed worker, and shard."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.models import model
from tests.helpers.runs import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(8):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    return path


def launch(folder: Path, output: Path, processes: int, restarts: int = 0, **fields: Any) -> None:
    options = {
        **{"data": str(folder), "output": str(output), "steps": 8, "batch_size": 4, "workers": 0},
        **{"learning_rate": 1e-3, "precision": "float32", "device": "cpu", "tensorboard": False},
        **{"log_every": 1, "checkpoint_every": 4, "model": SMALL, **fields},
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    done = subprocess.run(
        [*command, "-m", "tests.helpers.distributed_run", json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def logged(run: Path, name: str) -> list[float]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def losses(run: Path) -> list[float]:
    return logged(run, "loss")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def test_a_killed_worker_restarts_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """Four steps, a kill, four steps from the checkpoint: the same as eight straight."""
    model = {**SMALL, "ema_decay": 0.9}
    launch(folder, tmp_path / "straight", 2, model=model)
    launch(folder, tmp_path / "killed", 2, restarts=1, model=model, kill_at=5)
    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert [name for name, x in straight.items() if not torch.equal(x, killed[name])] == []
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "killed")) == 8


def test_runs_one_after_another(folder: Path, tmp_path: Path) -> None:
    """In the same workers, each in a process group of its own."""
    launch(folder, tmp_path / "run", 2, runs=3, steps=2)
    first, *others = (weights(tmp_path / f"run{n}") for n in ("", "1", "2"))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_stage_2_on_two_processes(folder: Path, tmp_path: Path) -> None:
    """The same for generator and discriminators, base tokenizer trained."""
    start = tmp_path / "start.safetensors"
    model("vqgan", image_size=(32, 32), iterations=2, bottleneck="continuous").save_pretrained(
        start
    )
    fields: dict[str, Any] = {
        **{"stage": "2", "perceptual": "off", "gan_schedule": [[0.2, 0.5]], "steps": 4},
        **{"start_from": str(start), "discriminators": "shared", "iterations_per_step": 1},
    }
    launch(folder, tmp_path / "one", 1, accumulate=2, **fields)
    launch(folder, tmp_path / "ddp", 2, **fields)
    launch(folder, tmp_path / "fsdp", 2, parallel="fsdp", **fields)
    expected = weights(tmp_path / "one")
    # Keys' biases, and biases before a GroupNorm with a channel to a group, change no output: their gradient is
    # rounding, of which AdamW makes steps.
    idle = ("in_proj_bias", "upsample.conv.bias")
    for name in ("ddp", "fsdp"):
        got = weights(tmp_path / name)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if not key.endswith(idle):
                torch.testing.assert_close(
                    got[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
                )
    for name in ("loss", "discriminator_gradient_norm", "gradient_norm"):
        ddp, fsdp = (logged(tmp_path / run, name)[-1] for run in ("ddp", "fsdp"))
        torch.testing.assert_close(fsdp, ddp, rtol=1e-3, atol=0)


def test_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 on two processes: the weights of one process with two accumulated parts."""
    fields: dict[str, Any] = {"steps": 4, "model": {**SMALL, "bottleneck": "continuous"}}
    launch(folder, tmp_path / "one", 1, accumulate=2, **fields)
    launch(folder, tmp_path / "ddp", 2, **fields)
    launch(folder, tmp_path / "fsdp", 2, parallel="fsdp", **fields)
    recomputing = {"parallel": "fsdp", "activation_checkpointing": True}
    launch(folder, tmp_path / "recomputing", 2, **recomputing, **fields)
    expected = weights(tmp_path / "one")
    for name in ("ddp", "fsdp", "recomputing"):
        got = weights(tmp_path / name)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
    # The log holds the first process's losses: the same pictures in the same order under both.
    torch.testing.assert_close(
        losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"), rtol=1e-5, atol=0
    )


def test_sharded_weights_go_on_in_other_processes(folder: Path, tmp_path: Path) -> None:
    """FSDP2 on two processes, then on one: it reads the rows that both wrote."""
    fields: dict[str, Any] = {"parallel": "fsdp", "model": {**SMALL, "bottleneck": "continuous"}}
    launch(folder, tmp_path / "straight", 2, **fields)
    for processes, stop_at in ((2, 3), (1, 0)):
        launch(folder, tmp_path / "changing", processes, stop_at=stop_at, **fields)
    expected, got = weights(tmp_path / "straight"), weights(tmp_path / "changing")
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5, msg=key)
    assert logged(tmp_path / "changing", "step") == list(range(1, 9))
    torch.testing.assert_close(
        losses(tmp_path / "changing"), losses(tmp_path / "straight"), rtol=1e-3, atol=0
    )


def test_shards_go_on_in_other_processes(tmp_path: Path) -> None:
    """Two, then three processes: each picture of an epoch is seen once."""
    names = []
    for shard, size in enumerate((5, 3, 9, 1, 4, 12, 2)):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as file:
            for number in range(size):
                names.append(f"{shard}-{number}.png")
                content = io.BytesIO()
                Image.new("RGB", (32, 32), (7 * shard, number, 0)).save(content, format="PNG")
                info = tarfile.TarInfo(names[-1])
                info.size = len(content.getvalue())
                file.addfile(info, io.BytesIO(content.getvalue()))
    fields: dict[str, Any] = {"batch_size": 6, "steps": 24, "shuffle_buffer": 4}
    fields["seen"] = str(tmp_path / "seen")
    for processes, stop_at in ((2, 4), (3, 0)):
        pattern = Path(tmp_path / "x-{0..6}.tar")
        launch(pattern, tmp_path / "run", processes, stop_at=stop_at, **fields)
    seen = Counter(x for file in tmp_path.glob("seen-*") for x in file.read_text().splitlines())
    assert sum(seen.values()) == 24 * 6 and set(seen.values()) == {1}
    checkpoint = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    data = json.loads((checkpoint / "run.json").read_text())["data"]
    over = min(position[0] for own in data for position in own["positions"])
    assert over >= 2
    for epoch in range(over):
        assert all(seen[f"{epoch} {name}"] == 1 for name in names)
