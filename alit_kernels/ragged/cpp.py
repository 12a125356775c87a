"""The ragged ops in C++ (csrc/ragged/ragged.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._cpp import core, threads
from .entries import COMMON, Arguments, Entries, packed, row_bytes


def _element(fill: float, dtype: torch.dtype) -> Arguments:
    element = torch.full((1,), fill, dtype=dtype)
    return element, element.element_size()


ENTRIES: Entries = {
    **COMMON,
    "unpack": lambda rows, offsets, max_length, fill, out: (
        *packed(rows, offsets),
        *_element(fill, rows.dtype),
        out,
        max_length,
        row_bytes(rows, 1),
    ),
}


def implementation(name: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Implementation of op ``name`` in C++: fills the outputs that ``allocate`` makes for its inputs."""
    entry = ENTRIES[name]

    def run(*inputs: Any) -> Any:
        outputs = allocate(*inputs)
        taken = entry(*inputs, outputs)
        numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in taken]
        if name != "cumulative_offsets":  # it is one pass over a few numbers, on one thread
            numbers.append(threads())
        getattr(core(), name)(*numbers)
        return outputs

    return run
