"""Training on several CPU processes under torchrun: equal to one process, killed workers, FSDP2, other numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alit.training import checkpoints
from tests.helpers import distributed_run
from tests.helpers.forks import fork
from tests.helpers.image_files import SIGN, saved, tar
from tests.helpers.models import model
from tests.helpers.runs import SMALL, config, differing, log_of, weights_of

pytestmark = pytest.mark.apart
#: Images of each shard.
SIZES = (5, 3, 9, 1, 4, 12, 2)
FOUR: dict[str, Any] = {"steps": 4, "model": {**SMALL, "bottleneck": "continuous"}}
SHARDED: dict[str, Any] = {**FOUR, "steps": 8, "parallel": "fsdp"}
AVERAGED = {**SMALL, "ema_decay": 0.9}


def write_data(path: Path) -> None:
    """Write a folder of images, shards, and a model to start from."""
    random = np.random.default_rng(0)
    (path / "images").mkdir()
    for index in range(8):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"images/{index}.png")
    for shard, size in enumerate(SIZES):
        members = {f"{shard}-{number}.png": saved(SIGN, "PNG").getvalue() for number in range(size)}
        tar(path / f"x-{shard}.tar", members)
    start = model("vqgan", image_size=(32, 32), iterations=2, bottleneck="continuous")
    start.save_pretrained(path / "start.safetensors")


def launch(path: Path, processes: int, runs: dict[str, dict[str, Any]], restarts: int = 0) -> None:
    """Run trainings, folder -> fields, one after another in the same workers."""
    options = []
    for name, fields in runs.items():
        extra = {x: fields.pop(x) for x in ("resume", "stop_at", "kill_at", "seen") if x in fields}
        values = {"data": str(path / "images"), "steps": 8, "checkpoint_every": 4, **fields}
        options.append({**config(output=str(path / name), **values).asdict(), **extra})
    said = path / "said.txt"
    process = fork(said, distributed_run.launch, processes, options, restarts)
    process.join(600)
    assert process.exitcode == 0, said.read_text()[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, which are trained with few starts of workers."""
    path = tmp_path_factory.mktemp("runs")
    write_data(path)
    stage2: dict[str, Any] = {
        **{"stage": "2", "perceptual": "off", "gan_schedule": [[0.2, 0.5]], "steps": 4},
        **{"start_from": str(path / "start.safetensors"), "discriminators": "shared"},
        "iterations_per_step": 1,
    }
    shards: dict[str, Any] = {
        **{"data": str(path / "x-{0..6}.tar"), "batch_size": 6, "steps": 24, "shuffle_buffer": 4},
        "seen": str(path / "seen"),
    }
    two: dict[str, dict[str, Any]] = {
        **{"ddp": {**FOUR}, "again": {**FOUR}, "fsdp": {**FOUR, "parallel": "fsdp"}},
        "recomputing": {**FOUR, "parallel": "fsdp", "activation_checkpointing": True},
        **{"straight": {**SHARDED}, "changing": {**SHARDED, "stop_at": 3}},
        **{"2 ddp": {**stage2}, "2 fsdp": {**stage2, "parallel": "fsdp"}},
        **{"unharmed": {"model": AVERAGED}, "shards": {**shards, "stop_at": 4}},
    }
    one: dict[str, dict[str, Any]] = {
        **{"one": {**FOUR, "accumulate": 2}, "2 one": {**stage2, "accumulate": 2}},
        "changing": {**SHARDED, "resume": True},
    }
    launch(path, 2, two)
    launch(path, 1, one)
    launch(path, 3, {"shards": {**shards, "resume": True}})
    return path


def test_a_killed_worker_restarts_bit_for_bit(runs: Path) -> None:
    """Four steps, a kill, and four steps from the checkpoint equal eight steps without a kill."""
    launch(runs, 2, {"killed": {"model": AVERAGED, "kill_at": 5}}, restarts=1)
    assert differing(weights_of(runs / "unharmed"), weights_of(runs / "killed")) == []
    assert log_of(runs / "killed") == log_of(runs / "unharmed")
    assert len(log_of(runs / "killed")) == 8


def test_the_command_of_the_guide(runs: Path) -> None:
    """``torchrun -m alit train`` with the configuration written by a run gives its weights, bit for bit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "3", "-m", "alit", "train"]
    done = subprocess.run(
        [*command, runs / "ddp/config.json", "--output", runs / "command", "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert differing(weights_of(runs / "ddp"), weights_of(runs / "command")) == []


def test_runs_one_after_another(runs: Path) -> None:
    """A second run in the same workers, in its own process group, gives the same weights."""
    assert differing(weights_of(runs / "ddp"), weights_of(runs / "again")) == []


@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [
        *((name, "one", {"rtol": 1e-3, "atol": 2e-5}) for name in ("ddp", "fsdp", "recomputing")),
        *((name, "2 one", {"rtol": 1e-4, "atol": 1e-5}) for name in ("2 ddp", "2 fsdp")),
        ("changing", "straight", {"rtol": 1e-3, "atol": 2e-5}),
    ],
)
def test_processes_train_as_one(
    name: str, expected: str, tolerance: dict[str, float], runs: Path
) -> None:
    """DDP and FSDP2 on two processes give the weights of one process with two accumulated microbatches, in stages 1 and
    2 (with discriminators); so does a sharded run resumed in one process, which reads the rows that both wrote.
    """
    got, wanted = weights_of(runs / name), weights_of(runs / expected)
    assert got.keys() == wanted.keys()
    # Keys' biases, and biases before a GroupNorm with one channel a group, change no output: their gradient is
    # rounding noise, which AdamW scales up to whole steps.
    idle = ("in_proj_bias", "upsample.conv.bias") if name.startswith("2") else ()
    for key, value in wanted.items():
        if not key.endswith(idle):
            torch.testing.assert_close(got[key], value, **tolerance, msg=key)


@pytest.mark.parametrize(
    ("names", "one", "other", "tolerance"),
    [
        # The log holds the first process's losses: both runs give it the same images in the same order.
        (("loss",), "fsdp", "ddp", 1e-5),
        (("loss", "discriminator_gradient_norm", "gradient_norm"), "2 fsdp", "2 ddp", 1e-3),
        (("step", "loss"), "changing", "straight", 1e-3),
    ],
)
def test_what_is_logged(
    names: tuple[str, ...], one: str, other: str, tolerance: float, runs: Path
) -> None:
    own, wanted = log_of(runs / one), log_of(runs / other)
    for name in names:
        values = [[line.get(name, 0.0) for line in log] for log in (own, wanted)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


def test_shards_go_on_in_other_processes(runs: Path) -> None:
    """A run on two and then three processes sees each image of an epoch once."""
    seen = Counter(x for file in runs.glob("seen-*") for x in file.read_text().splitlines())
    assert sum(seen.values()) == 24 * 6 and set(seen.values()) == {1}
    data = checkpoints.about(checkpoints.saved(runs / "shards")[-1])["data"]
    over = min(position[0] for own in data for position in own["positions"])
    assert over >= 2
    names = [f"{shard}-{number}.png" for shard, size in enumerate(SIZES) for number in range(size)]
    assert all(seen[f"{epoch} {name}"] == 1 for epoch in range(over) for name in names)
