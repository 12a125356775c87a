"""The training loop: batches in, steps, log, checkpoints; it stops and goes on at any step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..atomic_files import replacing
from ..console import report
from ..generation import Generator
from ..tokenizer import AdaptiveTokenizer
from . import checkpoints
from .base_stage import BaseStage
from .batches import batches
from .config import TrainingConfig
from .generator_stage import GeneratorStage
from .length_stage import LengthStage, add_length_head
from .log import Log, NotFinite, Terms
from .models import averaged_state, build, check_same_model, rebuilt, restoring_flags, write
from .optimization import schedule
from .processes import Processes, keep_memory, processes
from .resumption import drop_later, entered
from .rows import check_finite
from .signals import Interrupted, signals
from .stage import Stage, recomputed
from .stage1 import Stage1
from .stage2 import Stage2

STAGES: dict[str, Callable[..., Stage]] = {
    "base": BaseStage,
    "1": Stage1,
    "2": Stage2,
    "length": LengthStage,
    "generator": GeneratorStage,
}
#: Most names of skipped files that are kept.
MOST_NAMES = 10_000


class Result(NamedTuple):
    """Result of :func:`train`.

    Attributes:
        model: with averaged weights, in evaluation mode.
        steps: optimizer steps of the whole run.
        unreadable: the files that could not be read and the members of shards that were skipped, since the run
            started or went on, in all processes: their names, of shards with the reason.
    """

    model: AdaptiveTokenizer | Generator
    steps: int
    unreadable: list[str]


OnLog = Callable[[dict[str, float]], None]


def train(
    config: TrainingConfig,
    *,
    model: AdaptiveTokenizer | Generator | None = None,
    images: Tensor | None = None,
    resume: bool = False,
    checkpoint: str | None = None,
    allow_changes: bool = False,
    allow_addresses: bool = False,
    on_log: OnLog | None = None,
) -> Result:
    """Train an adaptive tokenizer, or a generator of its tokens; under torchrun, one process of several. On a CPU the
    process keeps the memory that steps free, afterwards too.

    Args:
        model: trained in place, instead of one made from ``config``.
        images: (N, 3, height, width) in [0, 1], in place of ``config.data``; flipped, never cropped.
        resume: go on from the newest checkpoint in ``config.output``, if there is one: bit for bit as if the run had
            never stopped. A worker that torchrun restarts does so unasked.
        checkpoint: with ``resume``, the name of the checkpoint to go on from, such as ``checkpoint-00000500``. What
            came after it is dropped: later checkpoints, lines of the log.
        allow_changes: go on even though the configuration differs.
        allow_addresses: shards may lie at http and https addresses.
        on_log: called every ``config.log_every`` steps with what ``log.jsonl`` gets: ``step``, ``done`` (fraction of
            the run), ``learning_rate``, ``images_per_second``, and the means of the loss terms and the gradient norm.

    Raises:
        ValueError: data, model, or checkpoint that do not fit; a resumed configuration that differs (listed); an output
            to which another run is writing.
        alit.CheckpointError: a damaged checkpoint; the message names the newest intact one.
        alit.training.NotFinite: NaN in the loss or in what a checkpoint would hold, such as weights; what came before
            is in the last checkpoint.
        alit.training.Interrupted: SIGINT or SIGTERM; a checkpoint was written.
        OSError: what cannot be read or written; checkpoints are written whole or not at all.
    """
    config.check_finite()
    with ExitStack() as stack:
        own = stack.enter_context(processes(config.device))
        if own.device.type == "cpu":
            keep_memory()
            stack.callback(keep_memory, False)
        devices = [own.device] if own.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        run = _Run(config, own, on_log, stack)
        source = entered(config, own, stack, resume, checkpoint, allow_changes)
        run.start(source, model, images, allow_addresses)
        try:
            return run.go()
        except NotFinite as error:
            kept = checkpoints.saved(run.output) if run.output is not None else []
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint"
            raise NotFinite(f"{error}; {last}") from error


class _Run:
    """State of one call of :func:`train` in one process."""

    def __init__(
        self, config: TrainingConfig, own: Processes, on_log: OnLog | None, stack: ExitStack
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

    def start(
        self,
        source: Path | None,
        model: AdaptiveTokenizer | Generator | None,
        images: Tensor | None,
        addresses: bool,
    ) -> None:
        """Build the model, its stage and its data, all in the state of the checkpoint ``source``."""
        config, own, stack = self.config, self.own, self.stack
        report("starting")
        torch.manual_seed(config.seed)
        self.model = build(config, source) if model is None else model
        if isinstance(self.model, AdaptiveTokenizer) and config.stage == "length":
            add_length_head(self.model)
        if source is not None and model is not None:
            check_same_model(model, source)
        self.model.to(own.device)
        stack.enter_context(restoring_flags(self.model))
        self.stage = STAGES[config.stage](self.model, config, own)
        if config.activation_checkpointing:
            assert isinstance(self.model, AdaptiveTokenizer)  # other stages refuse it
            stack.enter_context(recomputed(self.model, config.parallel))
        self.step, data, seconds = 0, None, 0.0
        if source is not None:
            about = checkpoints.about(source)
            data = checkpoints.load(source, self.tensors(), own)
            self.step, seconds = about["step"], about["seconds"]
        self.begun = time.monotonic() - seconds
        self.batches, left_out = batches(
            config, images, self.model, own, self.step, data, addresses=addresses
        )
        self.data_state: dict[str, Any] | None = getattr(self.batches, "state", None)
        self.skipped = dict.fromkeys(left_out[:MOST_NAMES])
        self.terms = Terms()
        self.log = None
        if source is not None:
            drop_later(source, own)
        if self.output is not None and own.first:
            self.log = Log(self.output, self.step, tensorboard=config.tensorboard)
            stack.callback(self.log.close)
            with replacing(self.output / "config.json") as file:
                file.write_text(json.dumps(config.asdict(), indent=1) + "\n")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, live, by name; sums that still travel between processes are applied first."""
        tensors = {f"average/{name}": x for name, x in self.stage.average.tensors().items()}
        for part, module in self.stage.modules.items():
            tensors |= {f"{part}/{name}": x for name, x in module.state_dict().items()}
        for part, optimizer in self.stage.optimizers.items():
            tensors |= {f"optimizer/{part}/{k}": x for k, x in optimizer.tensors().items()}
        return tensors

    def go(self) -> Result:
        logged = time.monotonic()
        config, first = self.config, self.step
        done, self.told = self._done(), ""
        with signals() as received:
            while done < 1:
                self._report(done)
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
                if self.step % config.image_every == 0:
                    self._write_images(parts[0])
                stop = self.own.any(bool(received))
                if self.step % config.checkpoint_every == 0 or last or stop:
                    self._save()
                if stop and not last:
                    by = received[0] if received else "another process"
                    then = (
                        "nothing was to be kept"
                        if self.output is None
                        else f"resume goes on from there (alit train {self.output}/config.json --resume)"
                    )
                    raise Interrupted(f"stopped by {by} after step {self.step}; {then}")
        if self.step == first and self.output is not None:
            self._save()
        return self._result()

    def _report(self, done: float) -> None:
        if self.config.seconds is None:
            report(self.stage.doing, self.step, self.config.steps, "steps", self.told)
        else:
            report(self.stage.doing, done, 1.0, tell=self.told)

    def _done(self) -> float:
        """Fraction of the run that is done."""
        seconds = self.config.seconds
        by_time = (time.monotonic() - self.begun) / seconds if seconds else 0.0
        return max(by_time, self.step / self.config.steps if self.config.steps else 1.0)

    def _next(self) -> Tensor:
        batch = next(self.batches)
        self.skipped |= dict.fromkeys(batch.unreadable[: MOST_NAMES - len(self.skipped)])
        if batch.images.numel() == 0:
            first, tried = next(iter(self.skipped)), len(self.skipped)
            raise ValueError(f"data: no image can be read, {tried} tried, {first} first")
        self.data_state = batch.state
        images = batch.images.to(self.own.device, non_blocking=True)
        return images.float() / 255 if images.dtype == torch.uint8 else images

    def _write_log(self, rate: float, done: float, speed: float) -> None:
        means = self.own.mean(self.terms.means())
        record = {"step": self.step, "done": done, "learning_rate": rate}
        record |= {"images_per_second": speed, **means}
        self.told = f"loss {means['loss']:.4f}, {speed:.1f} images/s"
        if self.log is not None:
            self.log.write(record)
        if self.on_log is not None and self.own.first:
            self.on_log(record)

    def _write_images(self, images: Tensor) -> None:
        """Write originals above reconstructions to TensorBoard; not with sharded weights: no process has them all."""
        if self.log is None or self.log.writer is None or self.config.parallel == "fsdp":
            return
        with self.stage.evaluating():
            some = images[:4]
            rows = [self.stage.originals(some), *self.stage.reconstructions(some)]
        grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        shown = grid.float().clamp(0, 1).cpu().numpy()
        self.log.writer.add_image("reconstructions", shown, self.step)

    def _save(self) -> None:
        """Write a checkpoint, and the averaged model beside it; of finite tensors only."""
        self.terms.check()
        tensors = self.tensors()
        check_finite(tensors, self.step, self.own)
        if self.output is None:
            return
        about = {
            "config": self.config.asdict(),
            "model": json.loads(self.model.config.to_json()),
            "seconds": time.monotonic() - self.begun,
            "torch": str(torch.__version__),
        }
        state = (tensors, about, self.data_state, self.own)
        checkpoints.save(self.output, self.step, *state, keep=self.config.keep)
        averaged = averaged_state(self.stage)
        if self.own.first:
            write(self.output / "model.safetensors", self.model, averaged)

    def _result(self) -> Result:
        state = averaged_state(self.stage)
        own = [*self.skipped]
        if len(own) == MOST_NAMES:
            own.append(f"and perhaps more than these {MOST_NAMES}")
        skipped = dict.fromkeys(x for names in self.own.gather(own) for x in names)
        del self.stage  # its data-parallel wrapper holds the process group, which ends now
        self.stack.close()
        model = rebuilt(self.model, state, sharded=self.config.parallel == "fsdp")
        return Result(model, self.step, list(skipped))
