"""Processes that start with everything imported: forks of a server that imports once a session."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("pytest", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp"),
        *("alit.cli", "alit.commands.train", "alit_kernels.aot", "triton"),
    ]
)


def fork(said: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Started process that runs ``function``, with its output written to the file ``said``.

    Triton's interpreter is off in it, and all work is on one thread.
    """
    _start()
    process = FORKS.Process(target=_run, args=(said, function, arguments))
    process.start()
    return process


def spawn(function: Callable[..., Any], processes: int, *arguments: Any) -> None:
    """Run ``function(rank, processes, ...)`` in ``processes`` processes; raises if one of them does."""
    _start()
    torch.multiprocessing.start_processes(
        _work, (function, processes, *arguments), processes, start_method="forkserver"
    )


def another_process() -> ProcessPoolExecutor:
    _start()
    return ProcessPoolExecutor(1, FORKS)


def _start() -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        forkserver.ensure_running()


def _run(said: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    _work(None, function, *arguments)


def _work(rank: int | None, function: Callable[..., Any], *arguments: Any) -> None:
    multiprocessing.set_start_method(None, force=True)  # the default, as in any new process
    torch.set_num_threads(1)
    gc.freeze()  # imported objects are neither collected nor copied on write
    status = None
    try:
        function(*(() if rank is None else (rank,)), *arguments)
    except SystemExit as error:
        status = error.code
    sys.exit(status)  # after the function's objects are freed, as at the end of a program
