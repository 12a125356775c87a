"""Where the time of a training step goes, part by part, forward and backward, within the step itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alit_kernels.nn import SelfAttention, VectorQuantizer

from ..harness.contest import DEVICE
from ..peers.baseline import EagerAttention, EagerQuantizer, Outcome, Step

PARTS = ("base", "encoder", "decoder", "attention", "quantizer", "optimiser", "rest")


class Stopwatch:
    """Charges time to the innermost part that is running; on a GPU by its own clock."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, str, bool]] = []

    def enter(self, part: str) -> None:
        self.events.append((_now(), part, True))

    def leave(self, part: str) -> None:
        self.events.append((_now(), part, False))

    def seconds(self) -> dict[str, float]:
        """By part.

        Raises:
            RuntimeError: parts that overlap without one holding the other.
        """
        result: dict[str, float] = {}
        running: list[str] = []
        for i, (moment, part, entering) in enumerate(self.events):
            if running:
                elapsed = _between(self.events[i - 1][0], moment)
                result[running[-1]] = result.get(running[-1], 0.0) + elapsed
            if entering:
                running.append(part)
            elif not running or running.pop() != part:
                raise RuntimeError(f"{part} ends, but it is not the innermost part that runs")
        return result


def _now() -> Any:
    if DEVICE != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if DEVICE != "cuda":
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class _Mark(torch.autograd.Function):
    """The identity; calls ``passed`` when the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return grad, None


def _watched(watch: Stopwatch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a tensor (and more) to a tensor or a quantizer's result, both of its directions charged."""

    def run(x: Tensor, *args: Any, **options: Any) -> Any:
        watch.enter(part)
        out = function(_Mark.apply(x, lambda: watch.leave(part)), *args, **options)
        through = out if isinstance(out, Tensor) else out.quantized
        through = _Mark.apply(through, lambda: watch.enter(part))
        watch.leave(part)
        return through if isinstance(out, Tensor) else out._replace(quantized=through)

    return run


def _timed(watch: Stopwatch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which has no backward, charged."""

    def run(*args: Any, **options: Any) -> Any:
        watch.enter(part)
        result = function(*args, **options)
        watch.leave(part)
        return result

    return run


def breakdown(step: Step) -> tuple[dict[str, float], Outcome]:
    """Seconds of one step by ``PARTS``, and what it returned.

    ``attention`` holds the attention modules of encoder and decoder with their projections, ``encoder`` and ``decoder``
    what else is in their blocks and in the decoder's last layers; ``rest`` is embeddings, losses and all between.
    """
    watch, model = Stopwatch(), step.model
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, part: str, how: Callable[..., Any] = _watched) -> None:
        replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, how(watch, part, getattr(owner, name)))

    replace(model.encoder, "forward", "encoder")
    for module in (model.decoder, model.decoder.ffn):
        replace(module, "forward", "decoder")
    replace(model.quantize, "forward", "quantizer")
    for module in model.modules():
        if isinstance(module, (SelfAttention, EagerAttention)):
            replace(module, "forward", "attention")
    assert isinstance(model.quantize, (VectorQuantizer, EagerQuantizer))
    replace(model.base_tokenizer, "encode", "base", _timed)
    replace(step, "optimise", "optimiser", _timed)
    try:
        result = _timed(watch, "rest", step)()
    finally:
        for owner, name, before in reversed(replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
    seconds = watch.seconds()
    return {part: seconds.get(part, 0.0) for part in PARTS}, result
