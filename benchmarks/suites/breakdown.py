"""Time of the parts of a training step, forward and backward, measured within the step itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from alit_kernels.nn import SelfAttention

from ..harness.contest import DEVICE
from ..peers.baseline import EagerAttention, Outcome, Step

PARTS = ("base", "encoder", "decoder", "attention", "quantizer", "optimizer", "rest")


class Stopwatch:
    """Stopwatch that charges time to the innermost running part; on a GPU it uses CUDA events."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, str, bool]] = []

    def enter(self, part: str) -> None:
        self.events.append((_now(), part, True))

    def leave(self, part: str) -> None:
        self.events.append((_now(), part, False))

    def seconds(self) -> dict[str, float]:
        """Seconds by part.

        Raises:
            RuntimeError: parts overlap without being nested.
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


def _timed(watch: Stopwatch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which has no backward, wrapped to charge its time to ``part``."""

    def run(*args: Any, **options: Any) -> Any:
        watch.enter(part)
        result = function(*args, **options)
        watch.leave(part)
        return result

    return run


def _hook(event: Callable[[str], None], part: str) -> Callable[..., None]:
    return lambda *_: event(part)


def breakdown(step: Step) -> tuple[dict[str, float], Outcome]:
    """Seconds of one step by ``PARTS``, and the step's outcome.

    ``attention`` holds the attention modules of encoder and decoder with their projections, ``encoder`` and ``decoder``
    the rest of their blocks and the decoder's last layers; ``rest`` is embeddings, losses and everything else.
    """
    watch, model = Stopwatch(), step.model
    parts = {model.encoder: "encoder", model.decoder: "decoder", model.decoder.ffn: "decoder"}
    parts[model.quantize] = "quantizer"
    for module in model.modules():
        if isinstance(module, (SelfAttention, EagerAttention)):
            parts[module] = "attention"
    with ExitStack() as stack:
        for module, part in parts.items():
            enter, leave = _hook(watch.enter, part), _hook(watch.leave, part)
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
                module.register_full_backward_pre_hook(enter),
                module.register_full_backward_hook(leave),
            ):
                stack.callback(handle.remove)
        for owner, name, part in (
            (model.base_tokenizer, "encode", "base"),
            (step, "optimize", "optimizer"),
        ):
            timed = _timed(watch, part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        result = _timed(watch, "rest", step)()
    seconds = watch.seconds()
    return {part: seconds.get(part, 0.0) for part in PARTS}, result
