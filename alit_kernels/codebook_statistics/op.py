"""Public function, schema and checks of codebook_statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import FLOATING, INTEGER, check_count, check_same, check_tensor
from .._library import Op
from .reference import codebook_statistics as _reference


def codebook_statistics(
    index: Tensor,
    z: Tensor,
    num_codes: int,
    *,
    mask: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Count and sum of the vectors assigned to each code: what an exponential moving average of a codebook needs.

    Args:
        index: (N,) int32 or int64, each in 0..num_codes - 1 where not masked.
        z: (N, D) float32, bfloat16, float16 or float64.
        num_codes: K.
        mask: (N,) bool, True where a vector counts.

    Returns:
        count (K,) float32, total (K, D) float32. Deterministic, not differentiable.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also an index out of range.
    """
    arguments = index, z, num_codes, mask, implementation
    if not is_dynamo_compiling() and (found := _known.call(*arguments)) is not None:
        return found
    check_tensor("z", z, dtype=FLOATING, ndim=2)
    check_tensor("index", index, dtype=INTEGER, shape=z.shape[:1])
    check_count("num_codes", num_codes, minimum=1)
    if mask is not None:
        check_tensor("mask", mask, dtype=torch.bool, shape=z.shape[:1])
    check_same("device", index=index, z=z, mask=mask)
    return _known.first(arguments, arguments[:-1])


def check_index(name: str, index: Tensor, size: int, mask: Tensor | None = None) -> None:
    """Check that a CPU index is in 0..size - 1 where ``mask`` is set; raises ``ValueError``."""
    used = index if mask is None else index[mask]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < size:
        raise ValueError(
            f"{name}: expected values in 0..{size - 1}, got {int(used.min())}..{int(used.max())}"
        )


_codebook_statistics = Op(
    "codebook_statistics(Tensor index, Tensor z, SymInt num_codes, Tensor? mask) -> (Tensor, Tensor)",
    reference=_reference,
    fake=lambda index, z, num_codes, mask: (
        z.new_empty(num_codes, dtype=torch.float32),
        z.new_empty((num_codes, z.shape[1]), dtype=torch.float32),
    ),
    others={
        "cpp": "alit_kernels.codebook_statistics.cpp:codebook_statistics",
        "triton": "alit_kernels.codebook_statistics.triton_:codebook_statistics",
    },
    check=lambda index, z, num_codes, mask: check_index("index", index, num_codes, mask),
)
_known = Public(_codebook_statistics, differentiable=False)
