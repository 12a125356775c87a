"""``pytest benchmarks``: options, pinned threads, and the fixture that runs a contest and reports its contenders."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alit_kernels._calls import ENVIRONMENT_VARIABLE
from alit_kernels._library import available, ops

from .harness.contest import DEVICE, REPLAY, THREADS, Absent, Contest, ceilings
from .harness.timing import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes, few rounds")


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reorganize = False  # the contenders of a contest stand together
    torch.set_num_threads(THREADS)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to time the reference as if it were ours."""
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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):
        del machine_info[private]
    arguments = [x for x in config.invocation_params.args if not x.startswith("--benchmark-json")]
    machine_info["alit"] = machine() | {
        "command": " ".join(["pytest", *arguments]),
        "device": DEVICE,
        "implementations": {
            name: op.choose("auto", DEVICE, torch.float32) for name, op in sorted(ops().items())
        },
        "ceilings": ceilings(),
    }


#: Case -> contender -> why it has no time.
LEFT_OUT = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict) -> None:
    output_json["left_out"] = config.stash.get(LEFT_OUT, {})


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def _contests() -> dict[str, Contest]:
    return {}


@pytest.fixture
def race(
    benchmark: Any, quick: bool, _contests: dict[str, Contest], pytestconfig: pytest.Config
) -> Callable[..., None]:
    """``race(group, name, make, rounds=9, warmup=1)``: report ``name`` of the contest of ``group``, made once."""

    def report(
        group: str, name: str, make: Callable[[], Contest], rounds: int = 9, warmup: int = 1
    ) -> None:
        if group not in _contests:
            _contests.clear()  # inputs and compiled code of the case before are not needed any more
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            _contests[group] = make()
            _contests[group].run(min(rounds, 3) if quick else rounds, warmup)
        contest = _contests[group]
        if failure := contest.failures.get(name):
            kind = "wrong" if isinstance(failure, AssertionError) else "failed"
            kind = "absent" if isinstance(failure, Absent) else kind
            reason = str(failure).strip() or type(failure).__name__
            left_out = pytestconfig.stash.setdefault(LEFT_OUT, {}).setdefault(group, {})
            left_out[name] = f"{kind}: {reason.splitlines()[0]}"
            if isinstance(failure, Absent):
                pytest.skip(f"{name} is absent: {failure}")
            raise failure
        samples = contest.samples[name]
        times = iter(samples)
        benchmark.group = group
        benchmark.extra_info.update(contest.info(name))
        benchmark.pedantic(
            lambda: None,
            setup=lambda: REPLAY.extend((0.0, next(times))),
            rounds=len(samples),
        )

    return report
