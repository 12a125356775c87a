"""The compiled core: build information and thread pool."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alit_kernels import _cpp, nearest_codeword
from alit_kernels._library import extension
from tests.helpers.forks import fork

core = extension()
if core is None:
    pytest.skip(
        "the compiled core is not installed (no C++ compiler at installation)",
        allow_module_level=True,
    )


@pytest.fixture(autouse=True, params=("own threads", "threads of torch"))
def team(request: pytest.FixtureRequest) -> Iterator[int]:
    """Address of the OpenMP team that the pool borrows; 0 for its own workers."""
    address = _cpp.openmp_team() if request.param == "threads of torch" else 0
    if request.param == "threads of torch" and not address:
        pytest.skip("torch is not linked to an OpenMP library here")
    core.use_team(address)
    yield address
    core.use_team(_cpp.openmp_team())


def test_team_of_torch_is_found() -> None:
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        assert _cpp.openmp_team()


def test_build_info() -> None:
    info = core.build_info()
    assert (
        info["version"]
        and info["instruction_set"] in _cpp.INSTRUCTION_SETS
        and info["threads"] >= 1
    )


@pytest.mark.parametrize("threads", (0, 1, 2, 3, 16))
@pytest.mark.parametrize(
    ("total", "grain"), [(0, 1), (1, 1), (7, 3), (1000, 1), (1000, 999), (5, 0)]
)
def test_ranges_cover_without_overlap(total: int, grain: int, threads: int) -> None:
    ranges = core.parallel_ranges(total, grain, threads)
    assert len(ranges) <= (8 * threads if threads > 1 else 1)
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(total))


def test_exception_reaches_the_caller_and_the_pool_survives() -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="failed at 50"):
            core.parallel_ranges(100, 1, 4, 50)
    assert len(core.parallel_ranges(100, 1, 4)) == 32


def test_concurrent_callers() -> None:
    """The GIL is released: several Python threads call at once, and each covers its whole range."""
    failures = []

    def call() -> None:
        for _ in range(200):
            if sum(end - begin for begin, end in core.parallel_ranges(64, 1, 3)) != 64:
                failures.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive(), "deadlock"
    assert not failures


def call_in_a_child() -> None:
    torch.set_num_threads(2)
    torch.randn(300, 300) @ torch.randn(300, 300)  # starts torch's threads
    torch.randn(10**6).exp()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        z = torch.arange(4096.0 * 8).view(4096, 8)
        nearest_codeword(z, z[:64])
        os._exit(0)
    print(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_first_call_in_a_forked_child(tmp_path: Path) -> None:
    """A first call works in a forked child, where torch's threads do not exist."""
    fork(tmp_path / "said", call_in_a_child).join()
    assert (tmp_path / "said").read_text() == "0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_pool_after_fork() -> None:
    """A forked worker (a data loader's) uses its own threads: OpenMP's do not survive a fork, and it would hang."""
    core.parallel_ranges(100, 1, 4)
    child = os.fork()
    if child == 0:
        os._exit(0 if len(core.parallel_ranges(100, 1, 4)) == 32 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
