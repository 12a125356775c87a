"""Public function, schema and checks of nearest_codeword."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import FLOATING, autocast_dtype, check_choice, check_same, check_tensor
from .._library import Op
from .reference import nearest_codeword as _reference

METRICS = ("euclidean", "cosine")
PRECISIONS = ("ieee", "tf32", "bf16")


def nearest_codeword(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    precision: str = "ieee",
    implementation: str = "auto",
) -> Tensor:
    """Index of the codebook row nearest to each vector.

    With ``precision="ieee"`` index i is exact up to rounding of direct differences: with d the squared distance in
    float64, ``d(i) <= (1 + 2 (D + 2) 2^-24) min d``. Exact ties (not those that rounding alone makes) take the lowest
    index; a NaN distance never wins; a row of NaN distances gives 0. "cosine" searches both sides normalized and
    rounded to float32.

    Args:
        z: (N, D) float32, bfloat16 or float16 (float64 in the reference).
        codebook: (K, D), K at least 1, dtype of ``z``.
        metric: "euclidean" or "cosine".
        precision: "ieee", or "tf32" or "bf16" to permit products at that precision, of vectors and codes whose norms
            are below 2^60; torch's own flags have no effect.

    Returns:
        (N,) int64. Not differentiable. Under autocast the search is in float32; float64 stays.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    arguments = z, codebook, metric, precision, implementation
    if not is_dynamo_compiling() and (found := _known.call(*arguments)) is not None:
        return found
    check_codebook(z, codebook, metric, precision, shape=(None, None))
    return _known.first(arguments, (*for_search(z, codebook), metric, precision))


def check_codebook(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    precision: str,
    *,
    shape: tuple[int | None, ...] | None = None,
) -> None:
    """Check the arguments of a search, as nearest_codeword and the ops that contain one take them."""
    check_tensor("z", z, dtype=FLOATING, shape=shape)
    if z.ndim == 0:
        raise ValueError("z: expected at least 1 dimension (..., D), got a scalar")
    check_tensor("codebook", codebook, dtype=FLOATING, shape=(None, z.shape[-1]))
    if codebook.shape[0] == 0:
        raise ValueError("codebook: expected at least 1 row, got 0")
    if autocast_dtype(z.device.type) is None or torch.float64 in (z.dtype, codebook.dtype):
        check_same("dtype", z=z, codebook=codebook)
    check_same("device", z=z, codebook=codebook)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, PRECISIONS)


def for_search(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors and codebook as they are searched: under autocast in float32, but for float64, which stays."""
    if autocast_dtype(z.device.type) is None or z.dtype == torch.float64:
        return z, codebook
    return z.float(), codebook.float()


_nearest_codeword = Op(
    "nearest_codeword(Tensor z, Tensor codebook, str metric, str precision) -> Tensor",
    reference=_reference,
    fake=lambda z, codebook, metric, precision: z.new_empty(z.shape[0], dtype=torch.int64),
    others={
        "cpp": "alit_kernels.nearest_codeword.cpp:nearest_codeword",
        "triton": "alit_kernels.nearest_codeword.triton_:nearest_codeword",
    },
)
_known = Public(_nearest_codeword, differentiable=False)
