"""The ragged ops in CUDA (csrc/ragged/ragged_cuda.h). Nothing synchronizes; lengths and offsets stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _cuda
from .entries import COMMON, Entries, packed, row_bytes

#: Messages for the error flags of csrc/ragged/ragged_cuda.h.
MESSAGES = {
    1: "offsets: expected an ascending sequence from 0, within the rows packed",
    2: "capacity: too small for the rows there are",
    4: "lengths: expected 0 or more, at most as many as there are positions",
}


def _pattern(fill: float, dtype: torch.dtype) -> tuple[int, ...]:
    """The fill value, repeated over 16 bytes, as two integers."""
    with (
        _disable_current_modes()
    ):  # the value follows from the arguments: dispatch modes need not see it made
        element = torch.full((1,), fill, dtype=dtype)
        data = bytes(element.view(torch.uint8).tolist()) * (16 // element.element_size())
    return tuple(int.from_bytes(part, "little", signed=True) for part in (data[:8], data[8:]))


ENTRIES: Entries = {
    **COMMON,
    "unpack": lambda rows, offsets, max_length, fill, out: (
        *packed(rows, offsets),
        *_pattern(fill, rows.dtype),
        out,
        max_length,
        row_bytes(rows, 1),
    ),
}
#: Scratch memory that the kernels of an op need beside its outputs; the last argument.
SCRATCH: dict[str, Callable[..., Tensor | int]] = {
    "tail_mask_backward": lambda grad, lengths, tokens_wanted, fill_wanted: (
        grad.new_empty(
            (grad.shape[0] * _cuda.library().alit_cuda_sum_blocks(grad.shape[1]), grad.shape[2]),
            dtype=torch.float32,
        )
        if fill_wanted
        else 0
    ),
}


def implementation(name: str, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Implementation of op ``name`` in CUDA: fills the outputs that ``allocate`` makes for its inputs."""

    def run(*inputs: Any) -> Any:
        outputs = allocate(*inputs)
        taken = ENTRIES[name](*inputs, outputs)
        if name in SCRATCH:
            taken = (*taken, SCRATCH[name](*inputs))
        _cuda.launch(name, inputs[0].device, *taken, messages=MESSAGES)
        return outputs

    return run
