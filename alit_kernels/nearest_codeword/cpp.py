"""nearest_codeword in C++ (csrc/nearest_codeword): always exact, whatever ``precision`` permits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cpp import core, instruction_set, matrix, pointer, threads
from .._vectors import unit


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    if metric == "cosine":
        z, codebook = unit(z), unit(codebook)
    return search(z, codebook, None)


def search(z: Tensor, codebook: Tensor, mask: Tensor | None) -> Tensor:
    """Index (...) of the row of ``codebook`` nearest to ``z`` (..., D); 0, unsearched, where not ``mask`` (...)."""
    index = torch.empty(z.shape[:-1], dtype=torch.int64)
    mask = None if mask is None else mask.contiguous()
    core().nearest_codeword(
        matrix(z), matrix(codebook), pointer(mask), pointer(index), threads(), instruction_set()
    )
    return index
