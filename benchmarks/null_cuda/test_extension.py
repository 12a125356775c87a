"""A plan calls the extension's CUDA kernels as Python does."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from alit_kernels import _plans

from . import cases

ENTRY_POINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int64))


def test_a_plan_calls_the_extension_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan passes the numbers that Python passed, and an address in the place of each tensor."""
    prepare, called, kept = _plans._prepared_call, [], []

    def prepared(name: str, arguments: tuple[Any, ...], device: int, *rest: Any) -> Any:
        expected = [torch.cuda.current_stream(device).cuda_stream, device, 0, *arguments]

        def taken(given: Any) -> int:  # replaces the entry point; 0 if all arguments are right
            called.append(name)
            return any(
                value == 0 if isinstance(x, torch.Tensor) else value != x
                for value, x in zip(given[: len(expected)], expected, strict=True)
            )

        kept.append(ENTRY_POINT(taken))
        address = ctypes.cast(kept[-1], ctypes.c_void_p).value
        *kernel, _, sizes, threads, shared, values, addresses = prepare(
            name, arguments, device, *rest
        )
        return *kernel, address, sizes, threads, shared, values, addresses

    # Shapes that no other test uses: plans learnt here launch nothing.
    monkeypatch.setattr(cases, "BATCH", 5)
    monkeypatch.setattr(cases, "ROWS", 5 * cases.LONGEST)
    monkeypatch.setattr(_plans, "_prepared_call", prepared)
    for case in cases.cases():
        for _ in range(2):
            x = case.leaf().requires_grad_(case.learns)
            y = case.ours(x)
            if case.learns:
                y.backward(torch.ones_like(y))
    assert len(set(called)) > 5
