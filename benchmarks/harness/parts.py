"""Parts of ``python -m benchmarks.harness.gpu``: the commands that it runs, in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Folder that commands run in; their relative paths begin here.
ROOT = Path(__file__).resolve().parents[2]
TESTS, SUITES = Path("tests", "alit_kernels"), Path("benchmarks", "suites")
KERNELS = ROOT / "alit_kernels"
#: Tests of compilers and emulation, which gain nothing from a GPU.
WITHOUT_GPU = ("test_aot", "test_cuda", "test_extension")
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """A command that runs as one part, with its share of the time.

    Attributes:
        share: largest fraction of the whole time that it may take.
        tool: program with options that runs the command; the part is absent if it is not installed or not allowed.
        results: names of result files, which a later run of the command continues.
        anew: run it even if it has passed before, since the machine may be another one of its kind.
    """

    name: str
    command: tuple[str, ...]
    share: float = 0.2
    tool: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    results: tuple[str, ...] = ()
    anew: bool = False


PYTEST = (PYTHON, "-m", "pytest")


def tests(out: Path, name: str, share: float, *options: str, **more: Any) -> Part:
    """Part that runs tests; tests that have passed in an earlier run are left out."""
    file = f"{name}.passed"
    command = (*PYTEST, *options, "-p", "benchmarks.harness.passed", f"--passed={out / file}")
    return Part(name, command, share, results=(file,), **more)


#: Suites that run first, in this order.
FIRST = ("test_codebooks", "test_ragged", "test_soft_codebook", "test_add_layer_norm", "test_mlp")
STEP, MODELS = "test_stage1_step", "test_encode_decode"
#: Metrics of ``ncu`` per kernel: time, load of the chip and of memory, bytes, occupancy, tensor cores, registers.
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "launch__registers_per_thread",
)


def all_parts(out: Path, rehearsal: bool) -> list[Part]:
    """Parts in the order in which they run; ``rehearsal``: small, on the CPU."""
    build = ("-m", "alit_kernels") if rehearsal else ("setup.py", "build_ext", "--inplace")
    # Without the compiled core the ragged ops would fall back to their references.
    extension = Part("extension", (PYTHON, *build), 0.35, anew=True)
    ncu = ("ncu", "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS))
    counters = (PYTHON, "-m", "benchmarks.suites.kernels", *(["--rehearsal"] * rehearsal))
    return [
        extension,
        *correctness(out, rehearsal),
        *times(out, rehearsal),
        Part("counters", counters, 0.1, () if rehearsal else ncu),
        compiled_peers(out, rehearsal),
        *sanitizers(out, rehearsal),
    ]


def correctness(out: Path, rehearsal: bool) -> list[Part]:
    """Parts that run all kernel tests, with graph capture and determinism (``test_device``); tests of training steps;
    and tests of the error bound of the search's products, which print the share of it that this device uses.
    """
    if rehearsal:
        kernels = [str(TESTS / f"test_{name}.py") for name in ("soft_codebook", "device")]
    else:
        kernels = [str(TESTS), *(f"--ignore={TESTS / name}.py" for name in WITHOUT_GPU)]
    # Compiling takes minutes, so all processors are used. -vv: a run that is cut off has named the tests that passed.
    together = ("-vv", "--tb=short", "-n", str(min(14, os.cpu_count() or 1)))
    training = (str(Path("tests", "alit", f"test_{x}.py")) for x in ("cuda_graph", "stage1"))
    chosen = "believed_from" if rehearsal else " or ".join(BOUND)
    bound = (str(TESTS / "test_nearest_codeword.py"), "-k", chosen, "-p", "no:randomly")
    return [
        tests(out, "kernels", 0.4, *together, *kernels),
        tests(out, "training", 0.15, "-q", *training, "-k", "[cuda or -cuda or on_a_gpu"),
        Part("bound", (*PYTEST, "-q", "-rP", *bound), 0.1),
    ]


#: Words in the names of the tests that compare errors of this device's products with the search's error bound.
BOUND = ("bound", "believed")


def suites(rehearsal: bool) -> list[str]:
    """Files of the ops' suites: the most decisive first, the one with most cases last."""
    if rehearsal:
        return [str(SUITES / "test_soft_codebook.py")]
    found = {path.stem for path in (ROOT / SUITES).glob("test_*.py")} - {STEP, MODELS}
    others = sorted(found - {*FIRST, "test_attention"})
    return [str(SUITES / f"{name}.py") for name in (*FIRST, *others, "test_attention")]


def timing(out: Path, rehearsal: bool, name: str, share: float, *options: str) -> Part:
    """Part that runs ``pytest benchmarks`` with these options and writes its rows to ``test_NAME.json``."""
    file = f"test_{name}.json"
    quick = ["--quick"] * rehearsal
    command = (*PYTEST, "-q", *options, f"--rows={out / file}", "--benchmark-quiet", *quick)
    return Part(name, command, share, results=(file,))


def times(out: Path, rehearsal: bool) -> list[Part]:
    """Parts that time every op and every peer that is not compiled, tune tiles, and time the model's paths."""
    step = [f"{SUITES / STEP}.py::{test}" for test in STEPS[: 1 if rehearsal else None]]
    models = f"{SUITES / MODELS}.py" + ("::test_decode" if rehearsal else "")
    small = ("--rehearsal", "--head-dim", "64") if rehearsal else ()
    tuning = []
    for module in sorted(
        f"alit_kernels.{path.parent.name}.tune" for path in KERNELS.glob("*/tune.py")
    ):
        file = f"tiles-{module.split('.')[1]}.json"
        command = (PYTHON, "-m", module, "--json", str(out / file), *small)
        tuning.append(Part(file.removesuffix(".json"), command, 0.2, results=(file,)))
    return [
        timing(out, rehearsal, "ops", 0.3, "--peers=plain", *suites(rehearsal)),
        *tuning,
        timing(out, rehearsal, "step", 0.25, "--peers=plain", *step),
        timing(out, rehearsal, "models", 0.15, models),
    ]


#: Tests of a training step without ``torch.compile``.
STEPS = ("test_stage1_step", "test_large_batch", "test_launches_of_a_step")
COMPILED_STEPS = ("test_compiled_step",)


def compiled_peers(out: Path, rehearsal: bool) -> Part:
    """Part that times compiled peers beside ours: a minute of compiling for a second of timing."""
    step = [] if rehearsal else [f"{SUITES / STEP}.py::{test}" for test in COMPILED_STEPS]
    return timing(out, rehearsal, "compiled", 0.4, "--peers=compiled", *step, *suites(rehearsal))


def sanitizers(out: Path, rehearsal: bool) -> list[Part]:
    """Parts that run a small set of tests under compute-sanitizer's memcheck and racecheck."""
    small = ("-q", str(TESTS / "test_device.py"), "-k", "test_same_bits_every_time")
    environment = {"ALIT_TEST_REPEATS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
    return [
        tests(
            *(out, name, 0.25, *small),
            tool=() if rehearsal else (*tool, name),
            environment=environment,
        )
        for name in ("memcheck", "racecheck")
    ]
