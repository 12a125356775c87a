"""Studies that share contenders with the suites verify what they measure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from alit_kernels.vector_quantize.cases import Case
from benchmarks.peers.attention import Problem
from benchmarks.studies import entropy_loss, instruction_sets, padding
from benchmarks.suites import test_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="studies of the CPU")


def test_padded_and_packed_attention_agree() -> None:
    lengths, size = (5, 9, 1), (test_attention.HEADS, test_attention.HEAD_DIM)
    race = test_attention.contest(lengths, step=True)
    calls = padding.contenders(Problem(lengths, *size, torch.float32, step=True))
    for call in calls.values():
        race.verify(call())
    assert len(calls) == 5


@pytest.mark.parametrize("measure", (instruction_sets.search, instruction_sets.step))
def test_codebook_ops_are_measured(measure: object) -> None:
    row = measure(Case(256, 32, 12), rounds=1)  # type: ignore[operator]
    own = "baseline" if measure is instruction_sets.search else "ours"
    assert row["shape"] == "256 x 32 x 12" and row[f"{own} ms"] > 0 and f"{own} MB" in row
    assert any(name.startswith("eager") for name in row)


def test_an_accelerated_quantizer_is_measured() -> None:
    row = entropy_loss.measure(codes=64, images=1, count=1)
    assert row["shape"] == "256 x 64 x 8" and row["largest relative difference"] < 1e-4
    assert row["ms"].keys() == row["peak MB"].keys() == {"eager", "accelerated"}
