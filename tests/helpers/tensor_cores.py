"""Products in Triton's interpreter rounded as by tensor cores: sums of eight exact products at a time, towards zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

#: Products that are summed before the sum is rounded: 8 in Ampere, more in later chips.
STEP = 8


@contextmanager
def rounded_towards_zero() -> Iterator[None]:
    """Context manager: ``tl.dot`` in the interpreter rounds sums towards zero; exact sums are computed in float64.

    Products of ``input_precision="ieee"`` are one multiply-add after the other, each rounded to the nearest.
    """
    from triton.runtime import interpreter

    def create_dot(builder: Any, a: Any, b: Any, start: Any, precision: Any, *options: Any) -> Any:
        x, y, total = (np.asarray(t.data, np.float64) for t in (a, b, start))
        exact = precision.name == "IEEE"
        step = 1 if exact else STEP
        for i in range(0, x.shape[-1], step):
            total = total + x[..., i : i + step] @ y[..., i : i + step, :]
            total = total.astype(np.float32).astype(np.float64) if exact else _truncated(total)
        return interpreter.TensorHandle(total.astype(start.data.dtype), start.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield


def _truncated(x: np.ndarray) -> np.ndarray:
    """float64 to the next float32 towards zero."""
    near = x.astype(np.float32)
    below = np.nextafter(near, np.float32(0))
    return np.where(np.abs(near) > np.abs(x), below, near).astype(np.float64)
