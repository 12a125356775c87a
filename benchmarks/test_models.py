"""Model paths: stage-1 training step, encoding, decoding. ``tiny`` on the published VQGAN, random weights, float32.

On a GPU the step is that of ``base`` in bfloat16 autocast; on a CPU also bfloat16 where ``alit train`` would choose it.
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

from alit import AdaptiveTokenizer, FixedLength, TransformerConfig, VQGANConfig
from alit.config import AdaptiveTokenizerConfig
from alit.losses import stage1_loss
from alit.training.stage1 import compile_blocks, precision

from .baseline import CapturedStep, Step, eager_copy
from .breakdown import breakdown
from .contest import DEVICE, THREADS, Absent, Contest, Work
from .timing import OtherLoad, peak_megabytes

GPU = DEVICE == "cuda"
NATIVE_BFLOAT16 = precision("auto", torch.device(DEVICE)).keywords["enabled"]
#: Tokens of each picture: 96 on average.
LENGTHS = (32, 256, 64, 96, 32, 128, 64, 96) if GPU else (32, 64, 96, 192)
ROUNDS = 9 if GPU else 2
ROUNDS_OF_STEP = 9 if GPU else 5
WARMUP = 2 if GPU else 0  # the verifying call has warmed it up


def model(quick: bool, size: str = "tiny") -> AdaptiveTokenizer:
    """For ``--quick`` two narrow layers and 64 x 64 pixels."""
    torch.manual_seed(0)
    if not quick:
        return AdaptiveTokenizer.from_size(size, base="vqgan").to(DEVICE)
    base = VQGANConfig(latent_channels=32, num_codes=64, channels=32, blocks=1)
    width = TransformerConfig(64, 2, 2)
    config = AdaptiveTokenizerConfig(
        base=base, encoder=width, decoder=width, image_size=(64, 64), codebook_size=256
    )
    return AdaptiveTokenizer(config).to(DEVICE)


def pictures(ours: AdaptiveTokenizer, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *ours.config.image_size, generator=generator).to(DEVICE)


CAPTURED = ("ours, captured", "ours, compiled and captured")
CONTENDERS = (
    *("eager baseline", "ours", "ours, compiled", "eager baseline, compiled"),
    *CAPTURED,
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


STEPS = (
    (
        Case("base", 12, torch.bfloat16),  # the eager step keeps 4.6 GB for each picture
        Case("base", 32, torch.bfloat16, CAPTURED),  # how busy ours keeps a GPU
    )
    if GPU
    else (Case("tiny", 2), *([Case("tiny", 2, torch.bfloat16)] if NATIVE_BFLOAT16 else []))
)


def contender(name: str, model: AdaptiveTokenizer, images: Tensor) -> Step:
    """A step on a copy of the model; compiled: its blocks, as ``alit train`` does on request."""
    eager = name.startswith("eager")
    copied = eager_copy(model) if eager else copy.deepcopy(model)
    if "compiled" in name:
        compile_blocks(copied)
    kind = CapturedStep if name.endswith("captured") else Step
    return kind(copied, images, published=eager)


def peak_alone(case: Case, name: str, quick: bool) -> float:
    """Peak memory of a step without its optimiser, which needs its own when the activations are gone."""
    torch.set_num_threads(THREADS)
    step = contender(name, *case.prepared(quick))
    with case.autocast():
        if name.endswith("compiled"):
            step.loss().backward()  # the compiler's memory is not the step's
        return peak_megabytes(lambda: step.loss().backward())


def peak_of_step(case: Case, name: str, quick: bool) -> dict[str, float]:
    """On a CPU in a process of its own: what others have left of the heap would count."""
    if GPU:
        return {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return {"peak_megabytes": process.submit(peak_alone, case, name, quick).result()}


def stage1(case: Case, quick: bool, with_compiled: bool) -> Contest:
    ours, images = case.prepared(quick)
    steps: dict[str, Step] = {}

    def prepare(name: str) -> Callable[[], tuple[Tensor, Tensor]]:
        if name.endswith("captured") and not GPU:
            raise Absent("CUDA graphs need a GPU")
        if "compiled" in name and not with_compiled:
            raise Absent("compiling takes minutes on the CPU; --compiled runs it")
        step = steps[name] = contender(name, ours, images)

        def call() -> tuple[Tensor, Tensor]:
            with case.autocast():
                return step()

        return call

    with FlopCounterMode(display=False) as counter:
        counted = contender("eager baseline", ours, images)
        counted.model.to("meta")
        stage1_loss(counted.model, images.to("meta"), together=False).total.backward()
    expected: list[tuple[Tensor, Tensor]] = []

    def verify(result: tuple[Tensor, Tensor]) -> None:
        """Against the first contender's."""
        expected.append(result)
        tolerance = 2e-2 if case.half else 1e-4
        torch.testing.assert_close(result, expected[0], rtol=tolerance, atol=1e-5)

    def inspect(name: str, call: Callable[[], Any]) -> Mapping[str, Any]:
        step = steps[name]
        found: dict[str, Any] = {"state_megabytes": step.state_bytes / 1e6}
        if isinstance(step, CapturedStep):
            return found | {"peak_megabytes": step.peak_megabytes}
        if "compiled" not in name:  # a stopwatch cannot look into compiled blocks
            load = OtherLoad()
            with case.autocast(), load:
                found["parts"] = breakdown(step)
            found["parts_other_load_percent"] = load.percent
        return found | peak_of_step(case, name, quick)

    return Contest(
        {name: partial(prepare, name) for name in case.contenders},
        verify,
        Work(flops=counter.get_total_flops()),
        notes={"images": case.batch},
        inspect=inspect,
    )


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(x, name, id=f"{x.id}-{name}") for x in STEPS for name in x.contenders],
)
def test_stage1_step(
    case: Case, name: str, race: Callable, quick: bool, with_compiled: bool, with_bfloat16: bool
) -> None:
    if case.half and not with_bfloat16:
        pytest.skip("two more minutes on the CPU; --bfloat16 runs it")
    race(case.name, name, lambda: stage1(case, quick, with_compiled), ROUNDS_OF_STEP, WARMUP)


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
        lambda found: torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5),
        Work(),
        notes={"images": 1},
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
def test_launches_of_a_step(name: str, race: Callable, quick: bool) -> None:
    race("stage-1 step, base's depth, width 64", name, lambda: launches(quick), 9, WARMUP)


def agreement(found: list[Tensor], expected: list[Tensor]) -> None:
    """A vector halfway between two codes may fall to either in a batch of another shape."""
    for indices, right in zip(found, expected, strict=True):
        share = float((indices == right).float().mean())
        assert share > 0.99, f"{1 - share:.1%} of the indices differ from those of a picture alone"


def encoding(quick: bool) -> Contest:
    """One length per picture: each leaves the batch when it has its tokens, or all run through every iteration."""
    ours = model(quick).eval()
    images = pictures(ours, len(LENGTHS))
    expected = [
        ours.encode(images[i : i + 1], FixedLength(n)).indices for i, n in enumerate(LENGTHS)
    ]
    step = ours.config.latents_per_iteration

    @torch.no_grad()
    def all_iterations() -> list[Tensor]:
        """The batch as it is through every iteration; each picture's tokens are those of its own one."""
        found: dict[int, Tensor] = {}
        for iteration in ours.rollout(images, predict_at=()):
            for i, length in enumerate(LENGTHS):
                if iteration.index == length // step - 1:
                    quantized = iteration.bottleneck.quantized
                    assert quantized is not None
                    found[i] = quantized.index[i]
        return [found[i] for i in range(len(LENGTHS))]

    def with_lengths() -> list[Tensor]:
        tokens = ours.encode(images, FixedLength(LENGTHS))
        return [tokens[i].indices for i in range(len(LENGTHS))]

    calls = {"ours": with_lengths, "every iteration for all": all_iterations}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        lambda found: agreement(found, expected),
        Work(),
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "every iteration for all"))
def test_encode_with_lengths(name: str, race: Callable, quick: bool) -> None:
    group = f"encode {len(LENGTHS)} pictures, 96 tokens on average"
    race(group, name, lambda: encoding(quick), ROUNDS, WARMUP)


def encoding_to(tokens: int, quick: bool) -> Contest:
    """Every picture to the same number of tokens."""
    ours = model(quick).eval()
    eager = eager_copy(ours)
    images = pictures(ours, 8 if GPU else 1)
    expected = eager.encode(images, FixedLength(tokens)).indices
    calls = {
        "ours": lambda: [ours.encode(images, FixedLength(tokens)).indices],
        "eager baseline": lambda: [eager.encode(images, FixedLength(tokens)).indices],
    }
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        lambda found: agreement(found, [expected]),
        Work(),
        notes={"images": len(images), "tokens": tokens},
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
@pytest.mark.parametrize("tokens", (32, 64, 128, 256))
def test_encode_to(tokens: int, name: str, race: Callable, quick: bool) -> None:
    race(f"encode to {tokens} tokens", name, lambda: encoding_to(tokens, quick), ROUNDS, WARMUP)


def decoding(quick: bool) -> Contest:
    """Tokens of mixed lengths to pixels, as one packed batch or a picture at a time."""
    ours = model(quick).eval()
    images = pictures(ours, len(LENGTHS))
    tokens = ours.encode(images, FixedLength(LENGTHS))

    def alone() -> Tensor:
        return torch.cat([ours.decode(tokens[i]) for i in range(len(tokens))])

    expected = alone()
    calls = {"ours": lambda: ours.decode(tokens), "a picture at a time": alone}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        lambda result: torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3),
        Work(),
        notes={"images": len(LENGTHS)},
    )


@pytest.mark.parametrize("name", ("ours", "a picture at a time"))
def test_decode(name: str, race: Callable, quick: bool) -> None:
    group = f"decode {len(LENGTHS)} pictures, 96 tokens on average"
    race(group, name, lambda: decoding(quick), ROUNDS, WARMUP)
