"""Public function, schema, checks and autograd of add_layer_norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import FLOATING, accumulation_dtype, check_number, check_same, check_tensor
from .._library import Op
from . import reference

#: Longest row that fits the registers of a program.
MOST_CHANNELS = 8192


class AddedNormalized(NamedTuple):
    """Result of :func:`add_layer_norm`: the sum and its layer norm, both of the shape of x."""

    total: Tensor
    normalized: Tensor


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> AddedNormalized:
    """Sum of a residual connection and its layer norm, in one pass over the rows.

    The bias of the linear layer that ends the branch is added here: its gradient is a sum over rows that the backward
    reads anyway.

    Args:
        x: (..., C) float32, bfloat16 or float16 (float64 in the reference).
        branch: what is added, of the shape of x; of any of these dtypes.
        branch_bias: (C,), added to every row; of any of these dtypes, like the next two.
        weight, bias: (C,) of the layer norm.
        eps: added to the variance.
        dtype: of ``normalized``; default: that of ``total``.

    Returns:
        :class:`AddedNormalized`: ``total = x + branch + branch_bias`` in the dtype that torch gives x + branch, and
        ``(total - mean) / sqrt(variance + eps) * weight + bias`` of its rows. Both are computed in float32 and
        differentiable with respect to all tensors.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or an ``eps`` below 0.
    """
    arguments = x, branch, branch_bias, weight, bias, eps, dtype, implementation
    if not is_dynamo_compiling() and (found := _public.call(*arguments)) is not None:
        return found
    check_tensor("x", x, dtype=FLOATING)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (..., C) with at least 1 channel, got {tuple(x.shape)}")
    check_tensor("branch", branch, dtype=FLOATING, shape=x.shape)
    vectors = {"branch_bias": branch_bias, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        check_tensor(name, vector, dtype=FLOATING, shape=x.shape[-1:])
    check_same("device", x=x, branch=branch, **vectors)
    eps = check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if dtype is None:
        dtype = torch.promote_types(x.dtype, branch.dtype)
    elif not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        got = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"dtype: expected a floating torch.dtype, got {got}")
    values = x, branch, branch_bias, weight, bias, eps, dtype
    return _public.first(arguments, values, _added)


def _added(results: tuple[Tensor, ...]) -> AddedNormalized:
    return AddedNormalized(*results[:2])


def _fake(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if branch is None:
        total, wide = x.new_empty(0), x
    else:
        total = wide = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    stats = x.new_empty((2, *x.shape[:-1]), dtype=accumulation_dtype(wide))
    return total, x.new_empty(x.shape, dtype=dtype), stats


def _fake_backward(
    grad_total: Tensor | None,
    grad_normalized: Tensor,
    total: Tensor,
    weight: Tensor,
    stats: Tensor,
    before: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = total.shape if branch_dtype != x_dtype else (0,)
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(apart, dtype=branch_dtype),
        stats.new_empty((3, total.shape[-1])),
    )


def _limit(x: Tensor, *_: Any) -> str:
    fits = x.shape[-1] <= MOST_CHANNELS
    return "" if fits else f"a row has more than {MOST_CHANNELS} channels"


forward = Op(
    # The sum (empty without a branch), its layer norm, and (2, ...) mean and reciprocal deviation of the rows.
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor weight, Tensor bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm,
    fake=_fake,
    others={"triton": "alit_kernels.add_layer_norm.triton_:add_layer_norm"},
    limits={"triton": _limit},
)
backward = Op(
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_normalized, Tensor total, Tensor weight, Tensor stats,"
    " Tensor? before, ScalarType x_dtype, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_backward,
    fake=_fake_backward,
    others={"triton": "alit_kernels.add_layer_norm.triton_:add_layer_norm_backward"},
    limits={"triton": lambda grad_total, *rest: _limit(*rest)},
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, branch_bias, weight, bias, _, _, ctx.implementation = inputs
    total, normalized, stats = output
    ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, weight, bias, branch_bias)]
    ctx.norm_dtype = normalized.dtype
    ctx.save_for_backward(x if branch is None else total, weight, stats)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_normalized: Tensor | None, _: None
) -> tuple[Any, ...]:
    total, weight, stats = ctx.saved_tensors
    x_dtype, branch_dtype, *of_vectors = ctx.dtypes
    if branch_dtype is None:  # the sum is then empty
        grad_total = None
    if grad_normalized is None:
        grad_normalized = torch.zeros_like(total, dtype=ctx.norm_dtype)
    grad_x, grad_branch, sums = backward(
        *(
            grad_total,
            grad_normalized,
            total,
            weight,
            stats,
            None,
            x_dtype,
            branch_dtype or x_dtype,
        ),
        implementation=ctx.implementation,
    )
    of_weight, of_bias, of_branch_bias = (
        None if dtype is None else each.to(dtype)
        for each, dtype in zip(sums, of_vectors, strict=True)
    )
    if branch_dtype in (None, x_dtype):
        grad_branch = None if branch_dtype is None else grad_x
    return grad_x, grad_branch, of_branch_bias, of_weight, of_bias, None, None


forward.register_autograd(_backward, _setup)
_public = Public(forward)
