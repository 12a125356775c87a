"""Inputs of codebook_entropy: shapes and temperatures of tests and benchmarks; the builder is vector_quantize's."""

from __future__ import annotations

from typing import NamedTuple

from ..vector_quantize.cases import Case as Vectors
from ..vector_quantize.cases import Inputs, make

__all__ = ["BENCHMARK_CASES", "TEST_CASES", "Case", "Inputs", "make"]


class Case(NamedTuple):
    """Vectors and codes, and the temperature, which their distances are divided by."""

    vectors: Vectors
    temperature: float


TEST_CASES = (
    Case(Vectors(6, 7, 5), 1.0),
    Case(Vectors(0, 4, 3), 1.0),
    Case(Vectors(1, 1, 1), 0.01),
    Case(Vectors(37, 70, 8, masked=True), 0.5),
    Case(Vectors(40, 33, 3, layout="duplicates"), 1.0),
    Case(Vectors(17, 40, 12, layout="two clusters"), 1e4),
    Case(Vectors(33, 65, 20), 5.0),
    Case(Vectors(50, 40, 12), 0.01),  # codes that no vector reaches
    Case(Vectors(5, 7, 300), 100.0),
)
#: LlamaGen's quantizer: 16 images of 256 tokens.
BENCHMARK_CASES = (Case(Vectors(4096, 16384, 8), 0.01),)
