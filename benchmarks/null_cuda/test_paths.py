"""GPU paths with the null CUDA: capture into CUDA graphs, refused captures, and both stages of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import alit_kernels as ak
from alit import AdaptiveTokenizer, FixedLength, TransformerConfig
from alit.training import NotFinite, TrainingConfig, train
from alit.training.cuda_graph import GradientGraph
from alit_kernels.nn import SelfAttention
from benchmarks.suites.test_stage1_step import Case, contender

from . import driver
from .cases import BATCH, LENGTH, LONGEST, ROWS, WIDTH, empty, zeros

NANO = {"image_size": (64, 64), "latents_per_iteration": 4, "iterations": 2}
SMALL = dict.fromkeys(("encoder", "decoder"), TransformerConfig(320, 2, 5))


def tokenizer(base: str = "dct", **options: Any) -> AdaptiveTokenizer:
    return AdaptiveTokenizer.from_size("nano", base=base, **NANO, **SMALL, **options).cuda().eval()


def captured(work: Callable[[], object]) -> int:
    """Capture ``work`` into a CUDA graph and replay it; returns the number of launches captured."""
    work()
    waits = driver.waits()
    work()
    assert driver.waits() == waits, "the host waited"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = driver.launches()
        work()
        launches = driver.launches() - before
    graph.replay()
    return launches


def test_a_step_is_captured() -> None:
    case = Case("tiny", 2, torch.bfloat16)
    prepared = case.prepared(False)
    steps = [contender(name, *prepared) for name in ("ours, captured", "ours")]
    with case.autocast():
        for step in steps:
            step()
        captured_step, step = (driver.counted(step, 1).launches for step in steps)
    assert 0 < captured_step < step / 10


def test_a_step_that_waits_is_refused() -> None:
    layer = torch.nn.Linear(4, 4).cuda()

    def waits(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = layer(x).sum()
        loss.backward()
        return {"loss": loss.detach() * loss.item()}

    with pytest.raises(torch.AcceleratorError, match="refused by the null CUDA"):
        GradientGraph(layer, waits, torch.zeros(2, 4, device="cuda"))


@pytest.mark.parametrize("halting", ["off", "mask"])
@pytest.mark.parametrize("base", ["dct", "vae", "vqgan"])
def test_encoding_to_a_fixed_length_is_captured(base: str, halting: str) -> None:
    model, images = tokenizer(base, halting=halting), torch.zeros(2, 3, 64, 64, device="cuda")

    assert captured(lambda: model.encode(images, FixedLength(4))) > 20
    assert captured(lambda: model.encode(images, FixedLength(8))) > 50


@pytest.mark.parametrize("halting", ["off", "mask", "drop"])
@torch.no_grad()
def test_a_rollout_runs(halting: str) -> None:
    assert len(list(tokenizer(halting=halting).rollout(torch.zeros(2, 3, 64, 64).cuda()))) == 2


@pytest.mark.parametrize("halting", ["off", "drop"])
@pytest.mark.parametrize("stage", ["1", "2"])
def test_training_runs(stage: str, halting: str) -> None:
    model = {"size": "nano", "base": "dct", "image_size": 64, "iterations": 2, "halting": halting}
    config = TrainingConfig(
        **{"stage": stage, "steps": 2, "batch_size": 2, "device": "cuda", "model": model},
        **{"tensorboard": False, "perceptual": "off", "output": None},
    )
    before = driver.launches()
    # Nothing is computed, so values may not be finite; that is found after the last step.
    with suppress(NotFinite):
        train(config, images=torch.zeros(2, 3, 64, 64))
    assert driver.launches() - before > 1000


def ragged() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    layer = SelfAttention(WIDTH, WIDTH // 64).to(device="cuda", dtype=torch.bfloat16)
    lengths, offsets = zeros(BATCH), zeros(BATCH + 1, dtype=torch.int32)
    keep = torch.ones(ROWS, dtype=torch.bool, device="cuda")
    select = torch.ones(BATCH, dtype=torch.bool, device="cuda")
    rows, more = empty(32, WIDTH), ROWS + 32 * BATCH
    return {
        "lengths": lambda x: layer(x.view(BATCH, -1, WIDTH), lengths=lengths),
        "offsets": lambda x: layer(x, offsets=offsets, max_length=LONGEST),
        "pack": lambda x: ak.pack(x.view(BATCH, -1, WIDTH), lengths, capacity=ROWS)[0],
        "unpack": lambda x: ak.unpack(x, offsets, max_length=LENGTH),
        "compact": lambda x: ak.compact(x, offsets, keep, capacity=ROWS)[0],
        "append": lambda x: ak.append(x, offsets, rows, capacity=more)[0],
        "append to some": lambda x: ak.append(x, offsets, rows, select=select, capacity=more)[0],
        "tail_mask": lambda x: ak.tail_mask(x.view(BATCH, -1, WIDTH), lengths, rows[0]),
    }


@pytest.mark.parametrize("name", ragged())
def test_ragged_modules_learn_without_waiting(name: str) -> None:
    link, x = ragged()[name], empty(ROWS, WIDTH).requires_grad_()

    def work() -> None:
        y = link(x)
        (x.grad,) = torch.autograd.grad(y, x, torch.ones_like(y))

    assert captured(work) > 1
    assert x.grad is not None and x.grad.shape == x.shape
