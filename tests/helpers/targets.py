"""(implementation, device) pairs of kernel tests, for ``pytest.mark.parametrize("target", targets("cpp"))``.

Triton runs on a GPU if there is one, else in its interpreter (see conftest.py), so the same tests cover both.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from alit_kernels._library import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Target(NamedTuple):
    implementation: str
    device: str


def targets(*implementations: str) -> list[object]:
    """Parameters for the reference and the named implementations; any that cannot run here is skipped with a reason."""
    result = [pytest.param(Target("reference", DEVICE), id="reference")]
    for name in implementations:
        device = "cpu" if name in ("cpp", "torch") else DEVICE
        reason = available(name, device)
        mark = pytest.mark.skipif(bool(reason), reason=reason)
        result.append(pytest.param(Target(name, device), id=f"{name}-{device}", marks=mark))
    return result


def targets_and_dtypes(*implementations: str, dtypes: tuple[torch.dtype, ...]) -> list[object]:
    """Parameters (target, dtype); the interpreter, with milliseconds for each program, gets only the first dtype."""
    return [
        pytest.param(*target.values, dtype, id=f"{target.id}-{dtype}", marks=target.marks)
        for target in targets(*implementations)
        for dtype in dtypes
        if target.values[0] != ("triton", "cpu") or dtype == dtypes[0]
    ]
