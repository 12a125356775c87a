"""``alit train`` that kills itself at a chosen moment, in forks of a process that imports once: see test_kills.py.

Each line of its input is a list of the moment, a file for what the command says, and the arguments of the command; it
prints the fork's process number, and when that has ended its exit status.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._dynamo  # which the optimiser imports, and takes longest

from alit import model_file
from alit.cli import app
from alit.commands import train
from alit.training import checkpoints, log


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(path: Path, function: Callable[[], Any]) -> None:
    """Write the whole file, cut it, and die."""
    function()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    die()


def prepare(moment: str) -> None:
    """Patch what comes at this moment; the second time it comes, since a first checkpoint is then there."""
    seen = [0]

    def second() -> bool:
        seen[0] += 1
        return seen[0] == 2

    if moment == "tensors":
        save = safetensors.torch.save_file

        def saving(tensors: Any, path: Path, **options: Any) -> None:
            if second():
                half(path, lambda: save(tensors, path, **options))
            save(tensors, path, **options)

        safetensors.torch.save_file = saving  # type: ignore[assignment]
    elif moment == "model":
        replacing = model_file.replacing

        def writing(path: Path) -> Any:
            if second():
                with replacing(path) as temporary:
                    temporary.write_bytes(b"x" * 1000)
                    die()
            return replacing(path)

        model_file.replacing = writing  # type: ignore[assignment]
    elif moment == "before the rename":
        move = checkpoints._move

        def moving(part: Path, target: Path) -> None:
            if second():
                die()
            move(part, target)

        checkpoints._move = moving
    elif moment == "after the rename":
        checkpoints.drop = lambda _: die()
    elif moment == "between the renames":
        # The checkpoint of a step that is there already is written again.
        rename = Path.rename

        def renaming(path: Path, target: Path) -> Path:
            result = rename(path, target)
            if str(target).endswith(".aside"):
                die()
            return result

        Path.rename = renaming  # type: ignore[assignment, method-assign]
    elif moment == "in the midst of a removal":

        def removing(path: Path, **_: Any) -> None:
            next(x for x in Path(path).iterdir() if x.is_file()).unlink()
            die()

        shutil.rmtree = removing  # type: ignore[assignment]
    elif moment == "log":
        write = log.Log.write

        def logging(self: log.Log, record: dict[str, float]) -> None:
            if second():
                self.file.write('{"step": 3, "lo')
                self.file.flush()
                die()
            write(self, record)

        log.Log.write = logging  # type: ignore[method-assign]
    elif moment == "config":
        write_text = Path.write_text

        def cut(path: Path, text: str) -> int:
            written = write_text(path, text[: len(text) // 2])
            if ".config.json" in path.name:
                die()
            return write_text(path, text) if written else 0

        Path.write_text = cut  # type: ignore[assignment, method-assign]
    else:
        assert moment == "none", moment
    assert train is not None  # imported before the fork


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        moment, said, *arguments = json.loads(line)
        fork = os.fork()
        if fork == 0:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                prepare(moment)
                app(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(fork, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
