"""``pytest benchmarks``: its options, the number of threads, and a fixture that runs a contest and reports its rows."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from alit_kernels._calls import ENVIRONMENT_VARIABLE
from alit_kernels._library import available, ops

from .harness.contest import DEVICE, REPLAY, THREADS, Absent, Contest, ceilings
from .harness.rows import Rows, compiled
from .harness.timing import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes, few rounds")
    parser.addoption(
        "--rows",
        type=Path,
        help="result file, written after every row; what it holds is not done again",
    )
    parser.addoption(
        "--peers",
        choices=("all", "plain", "compiled"),
        default="all",
        help="plain: none that a compiler writes; compiled: these beside ours, as cases of their own",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reorganize = False  # the contenders of a contest stand together
    torch.set_num_threads(THREADS)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too


def pytest_sessionstart(session: pytest.Session) -> None:
    """Raise ``pytest.UsageError`` if only the reference implementation could be timed."""
    wanted = ("triton", "cuda") if DEVICE == "cuda" else ("cpp",)
    reasons = [reason for name in wanted if (reason := available(name, DEVICE))]
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        reasons.append(f"{ENVIRONMENT_VARIABLE}=reference")
    if reasons:
        raise pytest.UsageError(
            f"benchmarks would time the slow reference on {DEVICE}: {'; '.join(reasons)}. What builds the kernels:"
            " pip install -e . (with a C++ compiler, and nvcc for CUDA)"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def about(config: pytest.Config) -> dict[str, Any]:
    """Machine, its measured ceilings, the implementation chosen for each op, and the command of this run."""
    options = ("--benchmark-json", "--rows")
    arguments = [x for x in config.invocation_params.args if not str(x).startswith(options)]
    return machine() | {
        "command": " ".join(["pytest", *map(str, arguments)]),
        "device": DEVICE,
        "implementations": {
            name: op.choose("auto", DEVICE, torch.float32) for name, op in sorted(ops().items())
        },
        "ceilings": ceilings(3) if config.getoption("quick") else ceilings(),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):
        del machine_info[private]
    machine_info["alit"] = about(config)


ROWS = pytest.StashKey[Rows]()


def rows_of(config: pytest.Config) -> Rows:
    """The :class:`Rows` of this run, made in the first call."""

    def head() -> dict[str, Any]:
        return {"machine_info": {"alit": about(config)}, "commit_info": get_commit_info()}

    if ROWS not in config.stash:
        config.stash[ROWS] = Rows(config.getoption("rows"), head)
    return config.stash[ROWS]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict) -> None:
    output_json["left_out"] = rows_of(config).left_out


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def _contests() -> dict[str, Contest]:
    return {}


def chosen(contest: Contest, peers: str) -> list[str]:
    """Names of the contenders that ``--peers`` asks for; compiled ones come with ours and the contest's reference."""
    names = list(contest.prepare)
    if peers == "plain":
        return [name for name in names if not compiled(name)]
    if peers == "compiled" and any(map(compiled, names)):
        beside = {"ours", *(names[:1] if contest.against_first else ())}
        return [name for name in names if compiled(name) or name in beside]
    return [] if peers == "compiled" else names


@pytest.fixture
def race(
    benchmark: Any, quick: bool, _contests: dict[str, Contest], pytestconfig: pytest.Config
) -> Callable[..., None]:
    """Function ``race(group, name, make, rounds=9, warmup=1)``: report contender ``name`` of the contest of ``group``.

    ``make`` is called, and the contest run, for the first contender of a group only.
    """
    rows, peers = rows_of(pytestconfig), pytestconfig.getoption("peers")

    def report(
        group: str, name: str, make: Callable[[], Contest], rounds: int = 9, warmup: int = 1
    ) -> None:
        if peers == "compiled" and not group.endswith(", compiled"):
            group += ", beside compiled peers"
        if group not in _contests:
            if rows.whole(group):
                pytest.skip("its row, or why it has none, is there already")
            _contests.clear()  # inputs and compiled code of the case before are not needed any more
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            contest = make()
            names = chosen(contest, peers)
            contest.prepare = {x: contest.prepare[x] for x in names}
            _contests[group] = contest
            rows.begin(group, names)
            contest.run(min(rounds, 3) if quick else rounds, warmup)
        contest = _contests[group]
        if name not in contest.prepare:
            pytest.skip(f"not among --peers={peers}")
        if failure := contest.failures.get(name):
            kind = "wrong" if isinstance(failure, AssertionError) else "failed"
            kind = "absent" if isinstance(failure, Absent) else kind
            reason = str(failure).strip() or type(failure).__name__
            rows.leave_out(group, name, f"{kind}: {reason.splitlines()[0]}")
            if isinstance(failure, Absent):
                pytest.skip(f"{name} is absent: {failure}")
            raise failure
        samples, info = contest.samples[name], contest.info(name)
        rows.add(group, info, samples)
        times = iter(samples)
        benchmark.group = group
        benchmark.extra_info.update(info)
        benchmark.pedantic(
            lambda: None,
            setup=lambda: REPLAY.extend((0.0, next(times))),
            rounds=len(samples),
        )

    return report
