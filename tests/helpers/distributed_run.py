"""A training run for torchrun, in which one process can be killed, or all stopped: see test_distributed.py."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from alit.training import Interrupted, TrainingConfig, train
from alit.training.shards import ShardStream


def main() -> None:
    options = json.loads(sys.argv[1])
    kill_at, runs = options.pop("kill_at", None), options.pop("runs", 1)
    stop_at, seen = options.pop("stop_at", None), options.pop("seen", None)
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
    if seen is not None:
        pictures = ShardStream._pictures

        def noting(*arguments: Any) -> Iterator[Any]:
            for at, picture, *rest in pictures(*arguments):
                if picture is not None:
                    with open(f"{seen}-{rank}.txt", "a") as file:
                        print(at.epoch, picture.name, file=file)
                yield at, picture, *rest

        ShardStream._pictures = noting  # type: ignore[assignment, method-assign]

    def stop(record: dict[str, float]) -> None:
        if record["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    for run in range(runs):
        output = f"{config.output}{run or ''}"
        with suppress(Interrupted):
            train(
                dataclasses.replace(config, output=output),
                resume=stop_at is not None,
                allow_changes=True,
                on_log=stop,
            )


if __name__ == "__main__":
    main()
