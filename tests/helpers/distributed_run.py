"""Training runs under torchrun, one after another, in which one process can be killed, or all stopped.

See test_distributed.py. A run is given by the fields of its configuration, and ``resume``, ``stop_at``, ``kill_at`` (a
step) and ``seen`` (prefix of the files in which each process notes the names of its images).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from alit.training import Interrupted, TrainingConfig, train
from alit.training.shards import ShardStream
from alit.training.stage1 import Stage1
from tests.helpers.runs import stopping


def dying(kill_at: int, step: Any = Stage1.step) -> Any:
    def step_or_die(self: Stage1, number: int, *arguments: Any) -> Any:
        if (
            number == kill_at
            and os.environ["RANK"] == "1"
            and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *arguments)

    return step_or_die


def noting(seen: str, members: Any = ShardStream._members) -> Any:
    def note(*arguments: Any) -> Iterator[Any]:
        for at, member, *rest in members(*arguments):
            if member is not None:
                with open(f"{seen}-{os.environ['RANK']}.txt", "a") as file:
                    print(at.epoch, member.name, file=file)
            yield at, member, *rest

    return note


def train_all(runs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for options in runs:
        names = ("resume", "stop_at", "kill_at", "seen")
        resume, stop_at, kill_at, seen = (options.pop(name, None) for name in names)
        config = TrainingConfig.from_mapping(options)
        with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
            if kill_at:
                patch.setattr(Stage1, "step", dying(kill_at))
            if seen:
                patch.setattr(ShardStream, "_members", noting(seen))
            train(config, resume=bool(resume), allow_changes=True, on_log=stopping(stop_at))


def launch(processes: int, runs: list[dict[str, Any]], restarts: int) -> None:
    """Train in ``processes`` workers that torchrun's agent forks from this process; it restarts them if one dies."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    alone = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(
        **{**alone, "nproc_per_node": processes, "max_restarts": restarts, "run_id": "test"},
        **{"start_method": "fork", "monitor_interval": 0.1},
    )
    elastic_launch(config, train_all)(runs)
