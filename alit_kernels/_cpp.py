"""Shared Python side of the C++ implementations: the core, addresses, type codes, the thread count."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._library import extension

#: Codes of ``alit::Type`` in csrc/types.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Names of alit::InstructionSet in csrc/instruction_set.h; each set includes those before it.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
#: Environment variable that names a lesser instruction set than the machine's best, for tests and comparisons.
INSTRUCTION_SET_VARIABLE = "ALIT_KERNELS_INSTRUCTION_SET"
#: Id of the process that imported this module; other processes are forks of it.
_FIRST_PROCESS = os.getpid()

threads = torch.get_num_threads


@functools.cache
def core() -> Any:
    """The compiled extension; C++ implementations are chosen only where it is installed."""
    module = extension()
    assert module is not None
    # The threads that torch had before a fork are not there in the child.
    module.use_team(openmp_team() if os.getpid() == _FIRST_PROCESS else 0)
    return module


def openmp_team() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch is linked to; 0 where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():  # not Linux
        return 0
    # Looked up in the library and in what it is linked to.
    team = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
    return 0 if team is None else ctypes.cast(team, ctypes.c_void_p).value or 0


def instruction_set() -> str:
    """Name of the instruction set that the environment asks for; empty for the best of this machine."""
    return os.environ.get(INSTRUCTION_SET_VARIABLE, "")


def type_code(tensor: Tensor) -> int:
    return TYPES[tensor.dtype]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor) -> Any:
    """A (..., D) tensor as the core's ``Rows``, which keeps it alive.

    There is no copy where the last dimension is contiguous and the others are one stride apart.
    """
    values = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    if values.shape[1] > 1 and values.stride(1) != 1:
        values = values.contiguous()
    rows = core().Rows(values.data_ptr(), type_code(values), *values.shape, values.stride(0))
    rows.tensor = values
    return rows
