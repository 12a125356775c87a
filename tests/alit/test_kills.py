"""``alit train`` killed at chosen and at random moments: it loses nothing and ends as a run without kills.

``ALIT_KILLS`` sets the number of kills at random moments (3 by default).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alit.training import checkpoints
from tests.helpers.forks import fork
from tests.helpers.killed_run import MOMENTS, command
from tests.helpers.runs import config, differing, log_of, weights_of

pytestmark = pytest.mark.apart
KILLS = int(os.environ.get("ALIT_KILLS", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(6):
        pixels = chance.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{index}.png")
    return path


def start(folder: Path, run: Path, moment: str, **fields: Any) -> Any:
    """Started process of ``alit train``, which kills itself at ``moment``."""
    values = {"data": str(folder), "output": str(run), "checkpoint_every": 2, **fields}
    file = run.with_suffix(".json")
    file.write_text(json.dumps(config(keep=1, **values).asdict()))
    return fork(run.with_suffix(".txt"), command, moment, "train", str(file), "--resume")


def end(folder: Path, run: Path, moment: str = "none", **fields: Any) -> None:
    """Run the command to its end; checks that it ends by itself, or is killed at ``moment``."""
    process = start(folder, run, moment, **fields)
    process.join()
    expected = 0 if moment == "none" else -signal.SIGKILL
    assert process.exitcode == expected, run.with_suffix(".txt").read_text()


def step_of_the_newest(run: Path) -> int:
    """Step of the newest checkpoint, which must be intact; 0 if there is none."""
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
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    end(folder, run, steps=6)
    return run


@pytest.mark.parametrize("moment", [x for x in MOMENTS if x != "none"])
def test_a_kill_at_a_chosen_moment(
    moment: str, folder: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    least = {"log": 0, "config": 0, "between the renames": 6}.get(moment, 2)
    if moment == "between the renames":  # happens when a step is written again
        end(folder, run, steps=6)
    end(folder, run, moment, steps=6)
    assert step_of_the_newest(run) >= least
    end(folder, run, steps=6)
    assert_same_end(run, straight, 6)


def test_kills_at_any_moment(folder: Path, tmp_path: Path) -> None:
    steps, chance, run = 20 + 8 * KILLS, random.Random(0), tmp_path / "run"
    end(folder, tmp_path / "straight", steps=steps)
    newest = killed = 0
    log = run / "log.jsonl"
    for _ in range(KILLS):
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        process = start(folder, run, "none", steps=steps)
        until = time.monotonic() + 60
        # A third of the kills come before the first step, the others later.
        while chance.random() < 0.997 and time.monotonic() < until:
            time.sleep(0.002)
            if log.exists() and log.read_bytes().count(b"\n") > lines:
                time.sleep(chance.choice((0.0, 0.02, 0.1, 0.3)) * chance.random())
                break
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert step_of_the_newest(run) >= newest
        newest = step_of_the_newest(run)
    assert killed >= KILLS / 2
    end(folder, run, steps=steps)
    assert_same_end(run, tmp_path / "straight", steps)
