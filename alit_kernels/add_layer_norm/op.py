"""Public function, schema, checks and autograd of add_layer_norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATING, accumulation_dtype, check_number, check_same, check_tensor
from .._library import Op
from . import reference

#: A row of more does not fit the registers of a program.
MOST_CHANNELS = 8192


class AddedNormalized(NamedTuple):
    """What :func:`add_layer_norm` returns: ``total = x + branch`` and its layer norm, both of the shape of x."""

    total: Tensor
    normalized: Tensor


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> AddedNormalized:
    """A residual connection and the layer norm behind it, which a transformer block has two of, in one pass.

    Args:
        x: (..., C) float32, bfloat16 or float16 (float64 in the reference).
        branch: what is added, of the shape of x; of any of these dtypes. None: nothing.
        weight, bias: (C,), of any of these dtypes.
        eps: added to the variance.
        dtype: of ``normalized``; default: that of ``total``.

    Returns:
        :class:`AddedNormalized`: ``total`` in the dtype that torch's addition gives (x itself without a branch), and
        ``(total - mean) / sqrt(variance + eps) * weight + bias`` of its rows, computed in float32. Both are
        differentiable with respect to all tensors.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or an ``eps`` below 0.
    """
    check_tensor("x", x, dtype=FLOATING)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (..., C) with at least 1 channel, got {tuple(x.shape)}")
    if branch is not None:
        check_tensor("branch", branch, dtype=FLOATING, shape=x.shape)
    check_tensor("weight", weight, dtype=FLOATING, shape=x.shape[-1:])
    check_tensor("bias", bias, dtype=FLOATING, shape=x.shape[-1:])
    check_same("device", x=x, branch=branch, weight=weight, bias=bias)
    eps = check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if dtype is None:
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    elif not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        got = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"dtype: expected a floating torch.dtype, got {got}")
    total, normalized, _ = _add_layer_norm(
        x, branch, weight, bias, eps, dtype, implementation=implementation
    )
    return AddedNormalized(x if branch is None else total, normalized)


def _fake(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
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
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    weight_wanted: bool,
) -> tuple[Tensor, ...]:
    apart = branch_dtype not in (None, x_dtype)
    of_weights = weight.shape if weight_wanted else (0,)
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty(total.shape if apart else 0, dtype=branch_dtype or x_dtype),
        weight.new_empty(of_weights),
        weight.new_empty(of_weights),
    )


def _limit(x: Tensor, *_: Any) -> str:
    fits = x.shape[-1] <= MOST_CHANNELS
    return "" if fits else f"a row has more than {MOST_CHANNELS} channels"


_add_layer_norm = Op(
    # The sum (empty without a branch: it is x), its layer norm, and (2, ...) mean and reciprocal deviation of the rows.
    "add_layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm,
    fake=_fake,
    others={"triton": "alit_kernels.add_layer_norm.triton_:add_layer_norm"},
    limits={"triton": _limit},
)
_add_layer_norm_backward = Op(
    # Gradients of x, of the branch where its dtype is another, of weight and bias where wanted; else empty.
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_normalized, Tensor total, Tensor weight, Tensor stats,"
    " ScalarType x_dtype, ScalarType? branch_dtype, bool weight_wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_layer_norm_backward,
    fake=_fake_backward,
    others={"triton": "alit_kernels.add_layer_norm.triton_:add_layer_norm_backward"},
    limits={"triton": lambda grad_total, grad_normalized, *_: _limit(grad_normalized)},
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, _, _, ctx.implementation = inputs
    total, _, stats = output
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.save_for_backward(x if branch is None else total, weight, stats)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_normalized: Tensor | None, _: None
) -> tuple[Any, ...]:
    total, weight, stats = ctx.saved_tensors
    x_dtype, branch_dtype = ctx.dtypes
    if grad_normalized is None:
        grads = (
            (None, None)
            if grad_total is None
            else (grad_total.to(x_dtype), grad_total.to(branch_dtype))
        )
        return *grads, None, None, None, None
    wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grad_x, grad_branch, grad_weight, grad_bias = _add_layer_norm_backward(
        None if branch_dtype is None else grad_total,
        grad_normalized,
        total,
        weight,
        stats,
        x_dtype,
        branch_dtype,
        wanted,
        implementation=ctx.implementation,
    )
    if branch_dtype is None:
        grad_branch = None
    elif branch_dtype == x_dtype:
        grad_branch = grad_x
    if not wanted:
        return grad_x, grad_branch, None, None, None, None
    return grad_x, grad_branch, grad_weight, grad_bias, None, None


_add_layer_norm.register_autograd(_backward, _setup)
