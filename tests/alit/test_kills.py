"""``alit train`` that is killed, at chosen moments and at any: nothing is lost, and it ends as a run without kills.

``ALIT_KILLS`` sets the number of kills at random moments (3 by default).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alit.training import checkpoints
from tests.helpers.killed_run import MOMENTS
from tests.helpers.runs import config, differing, log_of, weights_of

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("ALIT_KILLS", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(6):
        pixels = chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    return path


class Commands:
    """Starts the command, one at a time, in forks of one process."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.server, self.folder = server, folder
        self.said = Path()

    def start(self, run: Path, moment: str, **fields: Any) -> int:
        """The number of its process."""
        values = {"data": str(self.folder), "output": str(run), "checkpoint_every": 2, **fields}
        file, self.said = run.with_suffix(".json"), run.with_suffix(".txt")
        file.write_text(json.dumps(config(keep=1, **values).asdict()))
        arguments = [moment, str(self.said), "train", str(file), "--resume"]
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(arguments) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def status(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    def finish(self, run: Path, **fields: Any) -> None:
        self.start(run, "none", **fields)
        assert self.status() == 0, self.said.read_text()


@pytest.fixture(scope="module")
def commands(folder: Path) -> Iterator[Commands]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.killed_run"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Commands(server, folder)


def step_of_the_newest(run: Path) -> int:
    """Of the checkpoint that a start now would take, which is intact; 0 without any."""
    found = checkpoints.saved(run)
    if not found:
        return 0
    assert checkpoints.damage(found[-1]) is None
    return int(checkpoints.about(found[-1])["step"])


def assert_same_end(run: Path, straight: Path, steps: int) -> None:
    assert differing(weights_of(run), weights_of(straight)) == []
    assert [line["step"] for line in log_of(run)] == list(range(1, steps + 1))
    names = sorted(x.name for x in run.iterdir())
    newest = f"checkpoint-{steps:08d}"
    assert names == [".lock", newest, "config.json", "log.jsonl", "model.safetensors"]


@pytest.fixture(scope="module")
def straight(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    commands.finish(run, steps=6)
    return run


@pytest.mark.parametrize("moment", [x for x in MOMENTS if x != "none"])
def test_a_kill_at_a_chosen_moment(
    moment: str, commands: Commands, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    least = {"log": 0, "config": 0, "between the renames": 6}.get(moment, 2)
    if moment == "between the renames":  # of a step that is written again
        commands.finish(run, steps=6)
    commands.start(run, moment, steps=6)
    assert commands.status() == -signal.SIGKILL, commands.said.read_text()
    assert step_of_the_newest(run) >= least
    commands.finish(run, steps=6)
    assert_same_end(run, straight, 6)


def test_kills_at_any_moment(commands: Commands, tmp_path: Path) -> None:
    steps, chance, run = 20 + 8 * KILLS, random.Random(0), tmp_path / "run"
    commands.finish(tmp_path / "straight", steps=steps)
    newest = killed = 0
    log = run / "log.jsonl"
    for _ in range(KILLS):
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        process = commands.start(run, "none", steps=steps)
        until = time.monotonic() + 60
        # In a third of the cases before the first step, else after some of them.
        while chance.random() < 0.997 and time.monotonic() < until:
            time.sleep(0.002)
            if log.exists() and log.read_bytes().count(b"\n") > lines:
                time.sleep(chance.choice((0.0, 0.02, 0.1, 0.3)) * chance.random())
                break
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        killed += commands.status() == -signal.SIGKILL
        assert step_of_the_newest(run) >= newest
        newest = step_of_the_newest(run)
    assert killed >= KILLS / 2
    commands.finish(run, steps=steps)
    assert_same_end(run, tmp_path / "straight", steps)
