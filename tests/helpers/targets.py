"""Where a kernel test runs: (implementation, device) pairs, for ``pytest.mark.parametrize("target", targets("cpp"))``.

Triton runs on the GPU where there is one and in Triton's interpreter elsewhere (see conftest.py), so the same tests
cover both.
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
    """The reference and the named implementations; one that cannot run here is skipped with the reason."""
    result = [pytest.param(Target("reference", DEVICE), id="reference")]
    for name in implementations:
        device = "cpu" if name in ("cpp", "torch") else DEVICE
        reason = available(name, device)
        mark = pytest.mark.skipif(bool(reason), reason=reason)
        result.append(pytest.param(Target(name, device), id=f"{name}-{device}", marks=mark))
    return result


def targets_and_dtypes(*implementations: str, dtypes: tuple[torch.dtype, ...]) -> list[object]:
    """(target, dtype) pairs; the interpreter, at milliseconds for each program, gets the first dtype only."""
    return [
        pytest.param(*target.values, dtype, id=f"{target.id}-{dtype}", marks=target.marks)
        for target in targets(*implementations)
        for dtype in dtypes
        if target.values[0] != ("triton", "cpu") or dtype == dtypes[0]
    ]
