"""The stage-1 training step: ``base`` in bfloat16 autocast on a GPU.

On a CPU ``tiny`` in float32, also in bfloat16 where ``alit train`` would choose it.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alit import AdaptiveTokenizer, TransformerConfig, VQGANConfig
from alit.config import AdaptiveTokenizerConfig
from alit.losses import stage1_loss
from alit.training.processes import keep_memory
from alit.training.stage import compile_parts

from ..harness.contest import DEVICE, THREADS, Absent, Contest, Work, ready
from ..harness.timing import OtherLoad, peak_megabytes
from ..peers.baseline import CapturedStep, Outcome, Step, eager_copy
from .breakdown import breakdown
from .models import GPU, NATIVE_BFLOAT16, ROUNDS, WARMUP, model, random_images

CONTENDERS = ("eager baseline", "eager baseline, fused attention", "ours", "ours, captured")
COMPILED = (
    *("eager baseline", "ours", "eager baseline, compiled"),
    *("ours, compiled", "ours, compiled and captured"),
)


class Case(NamedTuple):
    """Model size, batch, dtype and contenders of a step; the first contender is the reference."""

    size: str
    batch: int
    dtype: torch.dtype = torch.float32
    contenders: tuple[str, ...] = CONTENDERS

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"stage-1 step {self.size} {dtype} batch {self.batch}"

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=self.half)

    def prepared(self, quick: bool) -> tuple[AdaptiveTokenizer, Tensor]:
        """Model in training mode with its base tokenizer frozen, and images (batch, 3, height, width)."""
        ours = model(quick, self.size).train()
        ours.base_tokenizer.requires_grad_(False)
        return ours, random_images(ours, self.batch)


#: The eager step keeps 4.6 GB for each image of a batch of ``base``, a captured one 1.8; 12 and 32 need 120 GB.
ROOMY = GPU and torch.cuda.get_device_properties().total_memory > 120e9
STEPS = (
    (Case("base", 12 if ROOMY else 6, torch.bfloat16),)
    if GPU
    else (Case("tiny", 2), *([Case("tiny", 2, torch.bfloat16)] if NATIVE_BFLOAT16 else []))
)
LARGE = Case("base", 32 if ROOMY else 16, torch.bfloat16, ("ours", "ours, captured"))
COMPILED_STEPS = (
    *(case._replace(contenders=COMPILED) for case in STEPS),
    LARGE._replace(contenders=("ours", "ours, compiled and captured")),
)


def contender(name: str, model: AdaptiveTokenizer, images: Tensor) -> Step:
    """Step of the named contender on a copy of the model; compiled ones in parts, as by ``alit train``'s option."""
    eager = name.startswith("eager")
    copied = eager_copy(model, "fused" in name) if eager else copy.deepcopy(model)
    if "compiled" in name:
        compile_parts(copied)
    kind = CapturedStep if name.endswith("captured") else Step
    return kind(copied, images, published=eager)


class Prepared:
    """Step of a contender in this process; ``outcome``: result of the last watched step."""

    outcome: Outcome

    def __init__(self, case: Case, name: str, model: AdaptiveTokenizer, images: Tensor) -> None:
        self.case, self.compiled = case, "compiled" in name
        self.step = contender(name, model, images)
        self._found: dict[str, Any] = {"state_megabytes": self.step.state_bytes / 1e6}

    def __call__(self) -> Outcome:
        with self.case.autocast():
            return self.step()

    def watched(self) -> Outcome:
        """Run one step and note its breakdown, unless compiled: a stopwatch cannot look into compiled blocks."""
        if self.compiled:
            self.outcome = self()
        else:
            with self.case.autocast(), OtherLoad() as load:
                self._found["parts"], self.outcome = breakdown(self.step)
            self._found["parts_other_load_percent"] = load.percent
        return self.outcome

    def found(self) -> dict[str, Any]:
        """Breakdown, peak memory and state of the step; takes one more step if its memory has not been measured."""
        if isinstance(self.step, CapturedStep):
            self._found["peak_megabytes"] = self.step.peak_megabytes
        elif "peak_megabytes" not in self._found:
            self._found["peak_megabytes"] = peak_megabytes(self.watched)
        return self._found


class Apart:
    """Step of a contender in a process of its own, so that heap freed by others does not hide its peak memory."""

    def __init__(self, case: Case, name: str, quick: bool) -> None:
        self._arguments = case, name, quick
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self) -> Outcome:
        return self._process.submit(_alone, *self._arguments).result()

    def found(self) -> dict[str, Any]:
        """Peak memory of the first call, and breakdown of the last."""
        return self._process.submit(_found_alone).result()


#: The step of this process: none, or one.
_own: list[Prepared] = []


def _alone(case: Case, name: str, quick: bool) -> Outcome:
    if _own:
        return _own[0].watched()
    torch.set_num_threads(THREADS)
    keep_memory()
    _own.append(Prepared(case, name, *case.prepared(quick)))
    _own[0].found()
    return _own[0].outcome


def _found_alone() -> dict[str, Any]:
    return _own[0].found()


def agree(found: Outcome, expected: Outcome, half: bool = False) -> None:
    """Check that loss, all terms of all iterations, and the norms of the whole gradient and of each part agree.

    In bfloat16 rounding changes the targets of a few base tokens. Gradients that consist of rounding errors, those of
    the keys' bias, count as zero.
    """
    tolerance, of_gradients = (2e-2, 0.1) if half else (1e-4, 1e-3)
    torch.testing.assert_close(found[:2], expected[:2], rtol=tolerance, atol=0)
    whole = found.gradients.norm(), expected.gradients.norm()
    torch.testing.assert_close(*whole, rtol=tolerance, atol=0)
    nothing = 1e-5 * float(expected.gradients.max())
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=of_gradients, atol=nothing)


def stage1(case: Case, quick: bool) -> Contest:
    ours, images = case.prepared(quick)

    def prepare(name: str) -> Prepared | Apart:
        if name.endswith("captured") and not GPU:
            raise Absent("CUDA graphs need a GPU")
        return Prepared(case, name, ours, images) if GPU else Apart(case, name, quick)

    with FlopCounterMode(display=False) as counter:
        counted = contender("eager baseline", ours, images)
        counted.model.to("meta")
        stage1_loss(counted.model, images.to("meta"), together=False).total.backward()

    return Contest(
        {name: partial(prepare, name) for name in case.contenders},
        partial(agree, half=case.half),
        Work(flops=counter.get_total_flops()),
        against_first=True,
        notes={"images": case.batch},
        inspect=lambda name, call: call.found(),
    )


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    """Parametrization over all contenders of all cases."""
    pairs = [pytest.param(x, name, id=f"{x.name}-{name}") for x in cases for name in x.contenders]
    return pytest.mark.parametrize(("case", "name"), pairs)


@each(STEPS)
def test_stage1_step(case: Case, name: str, race: Callable, quick: bool) -> None:
    race(case.name, name, lambda: stage1(case, quick), ROUNDS, WARMUP)


@pytest.mark.skipif(not GPU, reason="compiling whole models takes minutes on a CPU")
@each(COMPILED_STEPS)
def test_compiled_step(case: Case, name: str, race: Callable, quick: bool) -> None:
    race(f"{case.name}, compiled", name, lambda: stage1(case, quick), ROUNDS, WARMUP)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
@each((LARGE,))
def test_large_batch(case: Case, name: str, race: Callable, quick: bool) -> None:
    """Times our step with more images than the eager step has memory for."""
    race(case.name, name, lambda: stage1(case, quick), ROUNDS, WARMUP)


def launches(quick: bool) -> Contest:
    """Contest of a step of ``base``'s depth, so narrow that only the host's work for each kernel takes time."""
    torch.manual_seed(0)
    base = VQGANConfig(latent_channels=16, channels=32, blocks=1)
    size = AdaptiveTokenizerConfig.of_size("tiny" if quick else "base", base="vqgan")
    narrow = TransformerConfig(64, size.encoder.layers, 2)
    config = replace(size, base=base, image_size=(64, 64), encoder=narrow, decoder=narrow)
    ours = AdaptiveTokenizer(config).to(DEVICE).train()
    ours.base_tokenizer.requires_grad_(False)
    images = random_images(ours, 1)
    steps = {name: contender(name, ours, images) for name in ("eager baseline", "ours")}
    steps["ours"].together = True
    return Contest(ready(steps), agree, Work(), against_first=True, notes={"images": 1})


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
def test_launches_of_a_step(name: str, race: Callable, quick: bool) -> None:
    race("stage-1 step, base's depth, width 64", name, lambda: launches(quick), 9, WARMUP)
