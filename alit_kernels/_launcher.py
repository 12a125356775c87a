"""Facts about compiled Triton kernels for ``csrc/launcher``, which launches them. Imports no Triton.

``ALIT_KERNELS_LAUNCHER=0`` leaves all launches to Triton. A kernel's globals are not looked at again once it is
compiled.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch

from ._core import extension, sees_tensors

ENVIRONMENT_VARIABLE = "ALIT_KERNELS_LAUNCHER"
#: Arguments of a launch that are options, not arguments of the kernel.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


def launcher(launch: Callable[..., Any]) -> Any:
    """The core's launcher, which repeats known launches and leaves others to ``launch``; None where the core cannot.

    Args:
        launch: (kernel, grid, **named arguments and options) -> what Triton compiled; launches through Triton.
    """
    if not enabled():
        return None
    from triton import knobs

    return extension().Launcher(looks, launch, plan, knobs.runtime)


@functools.cache
def enabled() -> bool:
    """True if the core can launch kernels here and the environment permits it."""
    return (
        os.environ.get(ENVIRONMENT_VARIABLE, "1") != "0"
        and sees_tensors()
        and torch.cuda.is_available()
    )


def looks(kernel: Any, names: tuple[str, ...]) -> tuple[bytes, Any] | None:
    """Specialization of each named argument, a letter each (``Look`` in launcher.cpp), and Triton's caches of it.

    None where Triton has rules that are not known here: annotated types, arguments that are left out.
    """
    parameters = {p.name: p for p in kernel.params}
    letters = []
    for name in names:
        parameter = parameters.pop(name, None)
        if parameter is None:
            if name not in OPTIONS:
                return None
            letters.append("v")
        elif parameter.is_constexpr:
            letters.append("v")
        elif parameter.annotation_type or parameter.is_const:
            return None
        elif parameter.do_not_specialize:
            letters.append("t")
        else:
            letters.append("u" if parameter.do_not_specialize_on_alignment else "s")
    return None if parameters else ("".join(letters).encode(), kernel.device_caches)


def plan(kernel: Any, compiled: Any, names: tuple[str, ...]) -> tuple[int, int, int, bytes] | None:
    """Launch data of a compiled kernel: function, threads, bytes of shared memory, and for each machine-code parameter
    the position of its argument (-1: a null pointer), a byte each.

    None for launches of other kinds: clusters, cooperative or dependent ones, with scratch memory.
    """
    data = compiled.metadata
    special = (
        "launch_cooperative_grid",
        "launch_pdl",
        "global_scratch_size",
        "profile_scratch_size",
    )
    if data.num_ctas != 1 or any(getattr(data, name, 0) for name in special):
        return None
    signature = compiled.src.signature
    taken = [names.index(name) for name in kernel.arg_names if signature[name] != "constexpr"]
    ptx = compiled.asm["ptx"]
    entry = ptx[ptx.index(".entry") :]
    parameters = len(re.findall(r"\.param\b", entry[: entry.index(")")]))
    scratch = parameters - len(taken)  # pointers, which nothing uses
    if scratch not in (0, 1, 2):
        return None
    arguments = [*taken, *[-1] * scratch]
    compiled._init_handles()
    packed = b"".join(i.to_bytes(1, "little", signed=True) for i in arguments)
    return compiled.function, 32 * data.num_warps, data.shared, packed
