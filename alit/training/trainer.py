"""The training loop: batches in, steps, log, checkpoints; it stops and goes on at any step."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint as model_file
from ..files import alone, replacing
from ..tokenizer import AdaptiveTokenizer
from . import checkpoints
from .config import TrainingConfig
from .log import Log, NotFinite, Terms
from .models import averaged_state, build, check_same_model, rebuilt, restoring_flags
from .optimisation import schedule
from .pictures import Batch, ImageFolder, ImageTensor, Pictures, Share, shuffled_batches
from .processes import Processes, keep_memory, processes
from .shards import ShardBatches, ShardStream, is_shards
from .stage1 import recomputed, recomputed_parts
from .stages import build_stage


class Interrupted(RuntimeError):
    """The run was stopped by a signal; the message says what goes on from where."""


class Result(NamedTuple):
    """What :func:`train` returns.

    Attributes:
        model: with averaged weights, in evaluation mode.
        steps: optimiser steps of the whole run.
        unreadable: names of the files that could not be read (by this process, since it started).
    """

    model: AdaptiveTokenizer
    steps: int
    unreadable: list[str]


OnLog = Callable[[dict[str, float]], None]


def train(
    config: TrainingConfig,
    *,
    model: AdaptiveTokenizer | None = None,
    images: Tensor | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    on_log: OnLog | None = None,
) -> Result:
    """Train an adaptive tokenizer; under torchrun, one process of several. On a CPU the process keeps the memory that
    steps free, afterwards too.

    Args:
        model: trained in place, instead of one made from ``config``.
        images: (N, 3, height, width) in [0, 1], in place of ``config.data``; flipped, never cropped.
        resume: go on from the newest checkpoint in ``config.output``, if there is one: bit for bit as if the run had
            never stopped. A worker that torchrun restarts does so unasked.
        allow_changes: go on even though the configuration differs.
        on_log: called every ``config.log_every`` steps with what ``log.jsonl`` gets: ``step``, ``done`` (fraction of
            the run), ``learning_rate``, ``pictures_per_second``, and the means of the loss terms and the gradient norm.

    Raises:
        ValueError: data, model, or checkpoint that do not fit; a resumed configuration that differs (listed); an output
            to which another run is writing.
        alit.training.NotFinite: NaN in the loss; what came before is in the last checkpoint.
        alit.training.Interrupted: SIGINT or SIGTERM; a checkpoint was written.
        OSError: what cannot be read or written; checkpoints are written whole or not at all.
    """
    with ExitStack() as stack:
        own = stack.enter_context(processes(config.device))
        if own.device.type == "cpu":
            keep_memory()
        devices = [own.device] if own.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        run = _Run(config, own, model, images, resume, allow_changes, on_log, stack)
        return run.go()


class _Run:
    """One call of :func:`train` in one process."""

    def __init__(
        self,
        config: TrainingConfig,
        own: Processes,
        model: AdaptiveTokenizer | None,
        images: Tensor | None,
        resume: bool,
        allow_changes: bool,
        on_log: OnLog | None,
        stack: ExitStack,
    ) -> None:
        if config.seconds is not None and own.count > 1:
            raise ValueError(
                "seconds: the clocks of several processes differ; expected steps alone"
            )
        if config.parallel == "fsdp" and not torch.distributed.is_initialized():
            raise ValueError(
                "parallel: fsdp needs processes that torchrun started, got one without"
            )
        self.config, self.own, self.on_log, self.stack = config, own, on_log, stack
        self.output = None if config.output is None else Path(config.output)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if restarted and self.output is None:
            raise ValueError("output: a restarted worker has no checkpoint without it, got none")
        source = self._checkpoint(resume or restarted, allow_changes)
        torch.manual_seed(config.seed)
        self.model = build(config, source) if model is None else model
        if source is not None and model is not None:
            check_same_model(model, source)
        self.model.to(own.device)
        stack.enter_context(restoring_flags(self.model))
        self.stage = build_stage(self.model, config, own)
        if config.activation_checkpointing:
            stack.enter_context(recomputed(*recomputed_parts(self.model, config.parallel)))
        self.step, data, seconds = 0, None, 0.0
        if source is not None:
            about = checkpoints.about(source)
            data = checkpoints.load(source, self.tensors(), own)
            self.step, seconds = about["step"], about.get("seconds", 0.0)
        self.start = time.monotonic() - seconds
        self.unreadable: dict[str, None] = {}
        self.batches = self._batches(images, data)
        self.data_state: dict[str, Any] | None = data
        self.terms = Terms()
        self.log = None
        if self.output is not None and own.first:
            self.log = Log(self.output, self.step, tensorboard=config.tensorboard)
            stack.callback(self.log.close)
            with replacing(self.output / "config.json") as file:
                file.write_text(json.dumps(config.asdict(), indent=1) + "\n")

    def _checkpoint(self, resume: bool, allow_changes: bool) -> Path | None:
        """The checkpoint to go on from: the same in all processes."""
        if self.output is None:
            if resume:
                raise ValueError("resume: expected an output folder")
            return None
        if self.own.first:
            self.output.mkdir(parents=True, exist_ok=True)
            try:
                self.stack.enter_context(alone(self.output))
            except BlockingIOError as error:
                raise ValueError(f"output: another run is writing to {self.output}") from error
        found = checkpoints.saved(self.output) if self.own.first else []
        name = self.own.broadcast(found[-1].name if found else "")
        if not name:
            return None
        if not resume:
            raise ValueError(
                f"output: {self.output} holds a run up to {name}; resume it, or choose another folder"
            )
        differences = self.config.differences(checkpoints.about(self.output / name)["config"])
        if differences and not allow_changes:
            listed = "\n  ".join(differences)
            raise ValueError(f"resume: the configuration differs from that of {name}:\n  {listed}")
        return self.output / name

    def _batches(self, images: Tensor | None, state: dict[str, Any] | None) -> Iterator[Batch]:
        config, own = self.config, self.own
        share = Share(config.batch_size, config.accumulate, own.rank, own.count)
        pin = own.device.type == "cuda"
        if images is None and config.data is None:
            raise ValueError("data: expected a folder of pictures or shards, got none")
        names = ("crop", "flip", "convert_profiles", "max_megapixels")
        options: dict[str, Any] = {name: getattr(config, name) for name in names}
        size = self.model.config.image_size
        if images is None and is_shards(str(config.data)):
            stream = ShardStream(
                str(config.data),
                share,
                size=size,
                seed=config.seed,
                buffer=config.shuffle_buffer,
                workers=config.workers,
                state=state,
                **options,
            )
            return ShardBatches(stream, workers=config.workers, pin=pin)
        pictures: Pictures
        if images is None:
            pictures = folder = ImageFolder(str(config.data), size, **options)
            self.unreadable |= dict.fromkeys(folder.left_out)
        else:
            pictures = ImageTensor(images.cpu(), flip=config.flip)
        return shuffled_batches(
            pictures,
            share,
            seed=config.seed,
            workers=0 if images is not None else config.workers,
            steps=(self.step, config.steps),
            pin=pin,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All state, live, by name; sums that still travel between processes are applied first."""
        tensors = {f"average/{name}": x for name, x in self.stage.average.tensors().items()}
        for part, module in self.stage.modules.items():
            tensors |= {f"{part}/{name}": x for name, x in module.state_dict().items()}
        for part, optimiser in self.stage.optimisers.items():
            tensors |= {f"optimiser/{part}/{k}": x for k, x in optimiser.tensors().items()}
        return tensors

    def go(self) -> Result:
        logged = time.monotonic()
        config, first = self.config, self.step
        done = self._done()
        with _signals() as received:
            while done < 1:
                rate = config.peak_learning_rate * schedule(done, config.warmup)
                parts = [self._next() for _ in range(config.accumulate)]
                place = (config.seed, self.step, self.own.rank)
                torch.manual_seed(
                    int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
                )
                terms = self.stage.step(self.step, done, rate, parts)
                self.step += 1
                self.terms.add(self.step, terms)
                done = self._done()  # the only look at the clock: what ends the run is saved
                last = done >= 1
                if self.step % config.log_every == 0 or last:
                    now, steps = time.monotonic(), (self.step - 1) % config.log_every + 1
                    speed = min(steps, self.step - first) * config.batch_size / (now - logged)
                    logged = now
                    self._write_log(rate, done, speed)
                if self.step % config.picture_every == 0:
                    self._write_pictures(parts[0])
                stop = self.own.any(bool(received))
                if self.step % config.checkpoint_every == 0 or last or stop:
                    self._save()
                if stop and not last:
                    raise Interrupted(self._stopped(received))
        if self.step == first and self.output is not None:
            self._save()
        return self._result()

    def _done(self) -> float:
        """The fraction of the run that is behind it."""
        seconds = self.config.seconds
        by_time = (time.monotonic() - self.start) / seconds if seconds else 0.0
        return max(by_time, self.step / self.config.steps)

    def _next(self) -> Tensor:
        batch = next(self.batches)
        self.unreadable |= dict.fromkeys(batch.unreadable)
        if batch.images.numel() == 0:
            raise ValueError(
                f"data: no picture can be read, {len(self.unreadable)} tried, {next(iter(self.unreadable))} first"
            )
        self.data_state = batch.state
        images = batch.images.to(self.own.device, non_blocking=True)
        return images.float() / 255 if images.dtype == torch.uint8 else images

    def _checked(self, action: Callable[[], Any]) -> Any:
        """Run something that reads the loss; say where the last checkpoint is if it is not finite."""
        try:
            return action()
        except NotFinite as error:
            kept = checkpoints.saved(self.output) if self.output is not None else []
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint"
            raise NotFinite(f"{error}; {last}") from error

    def _write_log(self, rate: float, done: float, speed: float) -> None:
        means = self.own.mean(self._checked(self.terms.means))
        record = {"step": self.step, "done": done, "learning_rate": rate}
        record |= {"pictures_per_second": speed, **means}
        if self.log is not None:
            self.log.write(record)
        if self.on_log is not None and self.own.first:
            self.on_log(record)

    def _write_pictures(self, images: Tensor) -> None:
        """Originals above reconstructions; not of sharded weights, which one process does not have."""
        if self.log is None or self.log.writer is None or self.config.parallel == "fsdp":
            return
        with self.stage.evaluating(), torch.no_grad():
            rows = [images[:4], *self.stage.reconstructions(images[:4])]
        grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        self.log.picture(self.step, "reconstructions", grid)

    def _save(self) -> None:
        """A checkpoint, and the averaged model beside it; of finite weights only."""
        self._checked(self.terms.check)
        if self.output is None:
            return
        about = {
            "config": self.config.asdict(),
            "model": json.loads(self.model.config.to_json()),
            "seconds": time.monotonic() - self.start,
            "torch": str(torch.__version__),
        }
        state = (self.tensors(), about, self.data_state, self.own)
        checkpoints.save(self.output, self.step, *state, keep=self.config.keep)
        averaged = averaged_state(self.stage)
        if self.own.first:
            model_file.write(self.output / "model.safetensors", self.model.config, averaged)

    def _stopped(self, received: list[str]) -> str:
        by = received[0] if received else "another process"
        if self.output is None:
            return f"stopped by {by} after step {self.step}; nothing was to be kept"
        return f"stopped by {by} after step {self.step}; resume goes on from there"

    def _result(self) -> Result:
        state = averaged_state(self.stage)
        del self.stage  # its data-parallel wrapper holds the process group, which ends now
        self.stack.close()
        model = rebuilt(self.model, state, sharded=self.config.parallel == "fsdp")
        return Result(model, self.step, list(self.unreadable))


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Names of the SIGINT and SIGTERM that came; after the first of them, the next one ends the process at once."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
