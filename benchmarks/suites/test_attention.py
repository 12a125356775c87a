"""Attention: sequences of one length (dense), and of mixed lengths (packed); forward, and forward with backward.

float32 on the CPU (and bfloat16 where ``alit train`` would choose it), bfloat16 on a GPU (and a forward in float32, as
``encode`` has it); 8 heads of 64 channels, the lengths of the op's cases; one head of 256 or 512 channels over 16 x 16
or 32 x 32 positions, as a VQGAN has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit_kernels import varlen_attention
from alit_kernels.attention.cases import BENCHMARK_CASES

from ..harness.contest import DEVICE, Contest, Work, assert_near
from ..peers.attention import CONTENDERS, Problem
from .models import NATIVE_BFLOAT16

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
#: Largest error over the largest value, where inputs and probabilities are rounded to the dtype.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LENGTHS = tuple(case.lengths[0] for case in BENCHMARK_CASES)
HEADS, HEAD_DIM = BENCHMARK_CASES[0].heads, BENCHMARK_CASES[0].head_dim
SEQUENCES = 32 if DEVICE == "cuda" else 8
MIXED = LENGTHS * (SEQUENCES // len(LENGTHS))


def contest(
    lengths: tuple[int, ...],
    step: bool,
    dtype: torch.dtype = DTYPE,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> Contest:
    problem = Problem(lengths, heads, head_dim, dtype, step)
    exact = [x.detach().float().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = varlen_attention(
        *exact, problem.offsets, max_length=problem.longest, implementation="reference"
    )
    assert isinstance(out, Tensor)
    expected = [out.detach()]
    if step:
        expected += torch.autograd.grad(out, exact, problem.grad.float())

    def verify(results: list[Tensor]) -> None:
        rows = [(x[problem.inside] if x.ndim == 4 else x).float() for x in results]
        assert_near(rows, expected, TOLERANCES[dtype])

    scores = heads * sum(length**2 for length in lengths)
    # Two products forward; backward makes the scores again and four gradients.
    flops = 2 * head_dim * scores * (7 if step else 2)
    # Forward reads three and writes one; backward reads five (with the output) and writes three.
    traffic = (12 if step else 4) * problem.q.numel() * problem.q.element_size()
    return Contest(
        {name: partial(adapter, problem) for name, adapter in CONTENDERS.items()},
        verify,
        Work(traffic, flops),
        notes={"tokens": lengths[0]} if problem.equal else {},
    )


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("step", (False, True), ids=("forward", "step"))
def test_packed(step: bool, name: str, race: Callable, quick: bool) -> None:
    lengths = (33, 5, 64, 17) if quick else MIXED
    race(
        f"attention {'step' if step else 'forward'} {len(lengths)} x {min(lengths)} to {max(lengths)}",
        *(name, lambda: contest(lengths, step)),
    )


#: Lengths of the dense cases: all on a GPU, three on a CPU.
DENSE = LENGTHS if DEVICE == "cuda" else (LENGTHS[0], LENGTHS[3], LENGTHS[-1])


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("length", DENSE)
@pytest.mark.parametrize("step", (False, True), ids=("forward", "step"))
def test_dense(step: bool, length: int, name: str, race: Callable, quick: bool) -> None:
    if length != LENGTHS[-1] and (quick or (not step and DEVICE != "cuda")):
        pytest.skip("only the longest: --quick, or forward alone on a CPU")
    lengths = (65,) * 2 if quick else (length,) * SEQUENCES
    race(
        f"attention {'step' if step else 'forward'} {len(lengths)} x {lengths[0]}",
        *(name, lambda: contest(lengths, step)),
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="all are in float32 there")
@pytest.mark.parametrize("name", CONTENDERS)
def test_float32(name: str, race: Callable, quick: bool) -> None:
    lengths = (65,) * 2 if quick else LENGTHS[-1:] * SEQUENCES
    race(
        f"attention forward float32 {len(lengths)} x {lengths[0]}",
        *(name, lambda: contest(lengths, False, torch.float32)),
    )


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize(("head_dim", "length"), ((256, 256), (512, 256), (512, 1024)))
@pytest.mark.parametrize("step", (False, True), ids=("forward", "step"))
def test_one_wide_head(
    step: bool, head_dim: int, length: int, name: str, race: Callable, quick: bool
) -> None:
    if quick and (head_dim, step) != (256, True):
        pytest.skip("only the smallest step: --quick")
    lengths = (65,) * 2 if quick else (length,) * (SEQUENCES * 256 // length)
    race(
        f"attention {'step' if step else 'forward'} {head_dim} channels {len(lengths)} x {lengths[0]}",
        *(name, lambda: contest(lengths, step, heads=1, head_dim=head_dim)),
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="all are in bfloat16 there")
@pytest.mark.skipif(not NATIVE_BFLOAT16, reason="this processor multiplies no faster in bfloat16")
@pytest.mark.parametrize("name", CONTENDERS)
def test_bfloat16(name: str, race: Callable, quick: bool) -> None:
    lengths = (65,) * 2 if quick else LENGTHS[-1:] * SEQUENCES
    race(
        f"attention step bfloat16 {len(lengths)} x {lengths[0]}",
        *(name, lambda: contest(lengths, True, torch.bfloat16)),
    )
