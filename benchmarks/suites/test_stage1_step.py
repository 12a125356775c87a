"""The stage-1 training step: ``base`` in bfloat16 autocast on a GPU.

On a CPU ``tiny`` in float32, also in bfloat16 where ``alit train`` would choose it.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alit import AdaptiveTokenizer, TransformerConfig, VQGANConfig
from alit.config import AdaptiveTokenizerConfig
from alit.losses import stage1_loss
from alit.training.processes import keep_memory
from alit.training.stage import compile_parts

from ..harness.contest import DEVICE, THREADS, Absent, Contest, Work
from ..harness.timing import OtherLoad, peak_megabytes
from ..peers.baseline import CapturedStep, Outcome, Step, eager_copy
from .breakdown import breakdown
from .models import GPU, NATIVE_BFLOAT16, ROUNDS, WARMUP, model, pictures

CAPTURED = ("ours, captured", "ours, compiled and captured")
CONTENDERS = ("eager baseline", "eager baseline, fused attention", "ours", "ours, captured")
COMPILED = (
    *("eager baseline", "ours", "eager baseline, compiled"),
    *("ours, compiled", "ours, compiled and captured"),
)


class Case:
    """A step's size, pictures, precision and contenders; the first one's results are the others'."""

    def __init__(
        self,
        size: str,
        batch: int,
        dtype: torch.dtype = torch.float32,
        contenders: tuple[str, ...] = CONTENDERS,
    ) -> None:
        self.size, self.batch, self.dtype, self.contenders = size, batch, dtype, contenders
        self.half = dtype != torch.float32
        self.id = f"{size}-{batch}-{str(dtype).removeprefix('torch.')}"
        self.name = f"stage-1 step {size} {str(dtype).removeprefix('torch.')} batch {batch}"

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=self.half)

    def prepared(self, quick: bool) -> tuple[AdaptiveTokenizer, Tensor]:
        """The model, its base tokenizer frozen, and the pictures."""
        ours = model(quick, self.size).train()
        ours.base_tokenizer.requires_grad_(False)
        return ours, pictures(ours, self.batch)


#: The eager step keeps 4.6 GB for each picture of a batch of ``base``, a captured one 1.8; 12 and 32 need 120 GB.
ROOMY = GPU and torch.cuda.get_device_properties().total_memory > 120e9
STEPS = (
    (Case("base", 12 if ROOMY else 6, torch.bfloat16),)
    if GPU
    else (Case("tiny", 2), *([Case("tiny", 2, torch.bfloat16)] if NATIVE_BFLOAT16 else []))
)
COMPILED_STEPS = tuple(Case(x.size, x.batch, x.dtype, COMPILED) for x in STEPS)
LARGE = Case("base", 32 if ROOMY else 16, torch.bfloat16, CAPTURED)


def contender(name: str, model: AdaptiveTokenizer, images: Tensor) -> Step:
    """A step on a copy of the model; compiled: in parts, as ``alit train`` does on request."""
    eager = name.startswith("eager")
    copied = eager_copy(model, "fused" in name) if eager else copy.deepcopy(model)
    if "compiled" in name:
        compile_parts(copied)
    kind = CapturedStep if name.endswith("captured") else Step
    return kind(copied, images, published=eager)


def watched(case: Case, step: Step, name: str, found: dict[str, Any]) -> Outcome:
    """One step; its breakdown by part goes to ``found``: a stopwatch cannot look into compiled blocks."""
    load = OtherLoad()
    with case.autocast(), load:
        if "compiled" in name:
            return step()
        found["parts"], result = breakdown(step)
    found["parts_other_load_percent"] = load.percent
    return result


class Apart:
    """A step in a process of its own: what other contenders have left of the heap would count as free."""

    def __init__(self, case: Case, name: str, quick: bool) -> None:
        self._arguments = case, name, quick
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self) -> Outcome:
        return self._process.submit(_step_alone, *self._arguments).result()

    def found(self) -> dict[str, Any]:
        """Peak memory of the first call, breakdown of the last."""
        return self._process.submit(_found_alone).result()


#: In a step's own process: the step, and what is found of it.
_step: list[Step] = []
_found: dict[str, Any] = {}


def _step_alone(case: Case, name: str, quick: bool) -> Outcome:
    if _step:
        return watched(case, _step[0], name, _found)
    torch.set_num_threads(THREADS)
    keep_memory()
    step = contender(name, *case.prepared(quick))
    _step.append(step)
    if "compiled" in name:  # the compiler's memory is not the step's
        watched(case, step, name, {})
    results: list[Outcome] = []
    _found["peak_megabytes"] = peak_megabytes(
        lambda: results.append(watched(case, step, name, _found))
    )
    _found["state_megabytes"] = step.state_bytes / 1e6
    return results[0]


def _found_alone() -> dict[str, Any]:
    return _found


def agree(found: Outcome, expected: Outcome, half: bool = False) -> None:
    """The loss, every term of every iteration, the gradient as a whole and of every parameter.

    In bfloat16 rounding gives a few base tokens another target. What rounding alone makes, the gradient
    of the keys' bias, counts as none.
    """
    tolerance, of_gradients = (2e-2, 0.1) if half else (1e-4, 1e-3)
    torch.testing.assert_close(found[:2], expected[:2], rtol=tolerance, atol=0)
    whole = found.gradients.norm(), expected.gradients.norm()
    torch.testing.assert_close(*whole, rtol=tolerance, atol=0)
    nothing = 1e-5 * float(expected.gradients.max())
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=of_gradients, atol=nothing)


def stage1(case: Case, quick: bool) -> Contest:
    ours, images = case.prepared(quick)
    steps: dict[str, Step] = {}

    def prepare(name: str) -> Callable[[], Outcome]:
        if name.endswith("captured") and not GPU:
            raise Absent("CUDA graphs need a GPU")
        if not GPU:
            return Apart(case, name, quick)
        step = steps[name] = contender(name, ours, images)

        def call() -> Outcome:
            with case.autocast():
                return step()

        return call

    with FlopCounterMode(display=False) as counter:
        counted = contender("eager baseline", ours, images)
        counted.model.to("meta")
        stage1_loss(counted.model, images.to("meta"), together=False).total.backward()

    def inspect(name: str, call: Callable[[], Any]) -> Mapping[str, Any]:
        if isinstance(call, Apart):
            return call.found()
        step = steps[name]
        found: dict[str, Any] = {"state_megabytes": step.state_bytes / 1e6}
        if isinstance(step, CapturedStep):
            return found | {"peak_megabytes": step.peak_megabytes}
        peak = peak_megabytes(lambda: watched(case, step, name, found))
        return found | {"peak_megabytes": peak}

    return Contest(
        {name: partial(prepare, name) for name in case.contenders},
        partial(agree, half=case.half),
        Work(flops=counter.get_total_flops()),
        against_first=True,
        notes={"images": case.batch},
        inspect=inspect,
    )


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(x, name, id=f"{x.id}-{name}") for x in STEPS for name in x.contenders],
)
def test_stage1_step(case: Case, name: str, race: Callable, quick: bool) -> None:
    race(case.name, name, lambda: stage1(case, quick), ROUNDS, WARMUP)


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(x, name, id=f"{x.id}-{name}") for x in COMPILED_STEPS for name in COMPILED],
)
def test_compiled_step(
    case: Case, name: str, race: Callable, quick: bool, with_compiled: bool
) -> None:
    if not with_compiled:
        pytest.skip("compiling takes minutes on the CPU; --compiled runs it")
    race(f"{case.name}, compiled", name, lambda: stage1(case, quick), ROUNDS, WARMUP)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", CAPTURED)
def test_large_batch(name: str, race: Callable, quick: bool) -> None:
    """How busy ours keeps a GPU: more pictures than the eager step has memory for."""
    race(LARGE.name, name, lambda: stage1(LARGE, quick), ROUNDS, WARMUP)


def launches(quick: bool) -> Contest:
    """A step of ``base`` as on a GPU, but so narrow that what the host does for each of its kernels is all it takes."""
    torch.manual_seed(0)
    base = VQGANConfig(latent_channels=16, channels=32, blocks=1)
    size = AdaptiveTokenizerConfig.of_size("tiny" if quick else "base", base="vqgan")
    narrow = TransformerConfig(64, size.encoder.layers, 2)
    config = replace(size, base=base, image_size=(64, 64), encoder=narrow, decoder=narrow)
    ours = AdaptiveTokenizer(config).to(DEVICE).train()
    ours.base_tokenizer.requires_grad_(False)
    images = pictures(ours, 1)
    steps = {name: contender(name, ours, images) for name in ("eager baseline", "ours")}
    steps["ours"].together = True
    expected = steps["eager baseline"]()
    return Contest(
        {name: lambda step=step: step for name, step in steps.items()},
        lambda found: agree(found, expected),
        Work(),
        notes={"images": 1},
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
def test_launches_of_a_step(name: str, race: Callable, quick: bool) -> None:
    race("stage-1 step, base's depth, width 64", name, lambda: launches(quick), 9, WARMUP)
