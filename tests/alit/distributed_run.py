"""A training run for torchrun, in which one process can be killed: see test_distributed.py."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys

import torch

from alit.training import TrainingConfig, train


def main() -> None:
    options = json.loads(sys.argv[1])
    kill_at, runs = options.pop("kill_at", None), options.pop("runs", 1)
    torch.set_num_threads(1)
    config = TrainingConfig.from_mapping(options)

    rank = int(os.environ.get("RANK", "0"))
    if kill_at is not None and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        from alit.training.stage1 import Stage1

        step = Stage1.step

        def dying(self: Stage1, number: int, *arguments: object) -> object:
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number, *arguments)  # type: ignore[arg-type]

        Stage1.step = dying  # type: ignore[assignment, method-assign]
    for run in range(runs):
        train(dataclasses.replace(config, output=f"{config.output}{run or ''}"))


if __name__ == "__main__":
    main()
