"""Every op on the device, forward and backward: the same bits every time, and capture in a CUDA graph."""

from __future__ import annotations

import os

import pytest
import torch

import alit_kernels as ak
from tests.helpers.ops import OTHER_NAMES, runs
from tests.helpers.targets import DEVICE

REPEATS = int(os.environ.get("ALIT_TEST_REPEATS", 1000 if DEVICE == "cuda" else 10))
NAMES = tuple(runs(DEVICE))


def test_every_public_function_runs_here() -> None:
    functions = {name for name in ak.__all__ if name[0].islower() and callable(getattr(ak, name))}
    assert functions - OTHER_NAMES == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name: str) -> None:
    run = runs(DEVICE)[name]
    first = [x.clone() for x in run()]
    for _ in range(REPEATS):
        for result, expected in zip(run(), first, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_capture(name: str) -> None:
    run = runs(DEVICE)[name]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in run()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = list(run())
    for x in results:
        x.zero_()
    graph.replay()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_that_is_not_the_current_one(name: str) -> None:
    for result, expected in zip(runs("cuda:1")[name](), runs("cuda:0")[name](), strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), expected.cpu())
