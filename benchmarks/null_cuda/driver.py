"""Python interface of the null CUDA, a CUDA that does nothing: its setup, and counts of the calls it received."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

#: Functions without a body that may be called: they register code, or their result does not matter.
HARMLESS = {
    *("__cudaRegisterFunction", "__cudaRegisterVar", "__cudaRegisterFatBinaryEnd"),
    *("__cudaUnregisterFatBinary", "cuLogsRegisterCallback", "cuLogsUnregisterCallback"),
    *("cudaGetLastError", "cudaPeekAtLastError", "cudaFuncSetAttribute"),
    *("cudaEventRecord", "cudaEventRecordWithFlags", "cudaEventQuery", "cudaEventDestroy"),
    *("cudaStreamWaitEvent", "cudaStreamDestroy", "cudaThreadExchangeStreamCaptureMode"),
    *("cudaGraphDestroy", "cudaGraphExecDestroy"),
    *("cuInit", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuModuleUnload"),
    *("cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasSetMathMode"),
    *("cublasLtMatmulDescSetAttribute", "cublasLtMatrixLayoutSetAttribute"),
    "cublasLtMatmulPreferenceSetAttribute",
}


class Counts(NamedTuple):
    """Counts of one call: launches (fills of device memory too), waits, calls of Python and of C functions."""

    launches: int
    waits: int
    python: int
    c: int


@functools.cache
def library() -> ctypes.CDLL:
    """The null CUDA, loaded in the place of libcuda.

    Raises:
        SystemExit: the library in that place is not the null CUDA.
    """
    try:
        found = ctypes.CDLL("libcuda.so.1")
        found.null_cuda_count.restype = ctypes.c_int64
    except (OSError, AttributeError):
        raise SystemExit(
            "libcuda.so.1 is not the null CUDA; 'make host' runs this with it"
        ) from None
    found.null_cuda_unknown.restype = ctypes.c_char_p
    found.null_cuda_launch.restype = ctypes.POINTER(ctypes.c_uint64)
    found.null_cuda_parameters.argtypes = (ctypes.c_uint64, ctypes.c_int)
    return found


def prepare(core: Path | None = None) -> None:
    """Load the core of ``alit_kernels`` built for the null CUDA, disable cuDNN, and set one thread.

    Call it before anything imports ``alit_kernels``. cuDNN would query a device that does not exist for its plans.
    """
    library()
    if core is not None:
        spec = importlib.util.spec_from_file_location("alit_kernels._C", core)
        assert spec is not None and spec.loader is not None, core
        module = importlib.util.module_from_spec(spec)
        sys.modules["alit_kernels._C"] = module
        spec.loader.exec_module(module)
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_num_threads(1)


def unknown() -> list[str]:
    """Names of functions without a body that were called, except the harmless ones."""
    names, i = [], 0
    while (name := library().null_cuda_unknown(i)) is not None:
        names.append(name.decode())
        i += 1
    return [name for name in names if name not in HARMLESS]


def launches() -> int:
    return sum(library().null_cuda_count(counter) for counter in (0, 4))


def waits() -> int:
    return library().null_cuda_count(1)


def counted(call: Callable[[], object], warm_up: int = 4) -> Counts:
    """Exact counts of one call after ``warm_up`` others, with its backward run on this thread."""
    numbers = {"call": 0, "c_call": 0}

    def profile(_frame: object, event: str, _argument: object) -> None:
        if event in numbers:
            numbers[event] += 1

    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(warm_up):
            call()
        before = launches(), waits()
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
        numbers["c_call"] -= 1  # sys.setprofile itself
        return Counts(
            launches() - before[0], waits() - before[1], numbers["call"], numbers["c_call"]
        )
