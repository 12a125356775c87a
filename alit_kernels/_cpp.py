"""What the Python side of every C++ implementation needs: the core, addresses, type codes, the thread count."""

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
#: Of alit::InstructionSet in csrc/instruction_set.h; each has what those before it have.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
#: One of them: a lesser instruction set than the machine's best, for tests and comparisons.
INSTRUCTION_SET_VARIABLE = "ALIT_KERNELS_INSTRUCTION_SET"


@functools.cache
def core() -> Any:
    """The compiled extension; C++ implementations are chosen only where it is installed."""
    module = extension()
    assert module is not None
    module.use_team(0 if _forked else openmp_team())
    return module


#: Whether this process came of a fork. The threads that torch had before are not there in it.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def openmp_team() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch is linked to; 0 where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():  # not Linux
        return 0
    # Looked up in the library and in what it is linked to.
    team = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
    return 0 if team is None else ctypes.cast(team, ctypes.c_void_p).value or 0


def instruction_set() -> str:
    """What the environment asks for; empty for the best of this machine."""
    return os.environ.get(INSTRUCTION_SET_VARIABLE, "")


def type_code(tensor: Tensor) -> int:
    return TYPES[tensor.dtype]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor) -> Any:
    """A (..., D) tensor as the core's ``Rows``, which keeps it alive.

    Without a copy where the last dimension is contiguous and the others are one stride apart.
    """
    values = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    if values.shape[1] > 1 and values.stride(1) != 1:
        values = values.contiguous()
    rows = core().Rows(values.data_ptr(), type_code(values), *values.shape, values.stride(0))
    rows.tensor = values
    return rows


def threads() -> int:
    return torch.get_num_threads()
