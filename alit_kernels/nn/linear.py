"""Linear layers for short sequences: less memory after a GELU, and on some CPUs less time in float32.

torch multiplies float32 matrices on a CPU by MKL, which leaves AVX-512 unused on AMD's processors. oneDNN, which torch
has on board for its convolutions, uses it. What watches torch's operators (FLOP counters, transforms, the compiler)
sees ``torch.nn.functional.linear`` as ever, as do small products and whatever oneDNN does not take.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .._cpu import mkl_is_slow
from .._dispatch import transformed

#: Minimum multiply-adds for oneDNN to pay off.
LEAST = 2**22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x W^T + b, by the faster of torch's libraries.

    Args:
        x: (..., C) of any dtype and device.
        weight: (O, C).
        bias: (O,).

    Returns:
        (..., O).
    """
    if not _through_onednn(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _apply(x, weight, bias, False)
    return _onednn(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` that computes by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GELULinear(nn.Linear):
    """Linear layer after an exact GELU: ``linear(gelu(x))``.

    The output of the GELU, a quarter of what a transformer block would keep for its backward, is computed again there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.autograd.forward_ad._current_level < 0:
            return _apply(x, self.weight, self.bias, True)
        return linear(gelu(x), self.weight, self.bias)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, activated: bool) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _TransformableLinear.apply(x, weight, bias, activated)
    return _Linear.apply(x, weight, bias, activated)


def _keep(ctx: Any, x: Tensor, weight: Tensor, activated: bool) -> None:
    ctx.activated, ctx.dtype = activated, x.dtype
    wants_x, wants_weight, *_ = ctx.needs_input_grad
    needs_x = wants_weight or (wants_x and activated)
    ctx.save_for_backward(x if needs_x else None, weight if wants_x else None)


class _Linear(torch.autograd.Function):
    """Autograd function x W^T + b, or gelu(x) W^T + b where ``activated``; keeps x and W as gradients need them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activated: bool
    ) -> Tensor:
        _keep(ctx, x, weight, activated)
        return linear(gelu(x) if activated else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        # Under autocast the product is of another type than x and the weight.
        if wants_x:
            grad_x = linear(grad, weight.to(grad.dtype).t()).to(ctx.dtype)
            if ctx.activated:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        if wants_weight:
            factor = gelu(x) if ctx.activated else x
            grad_weight = _transposed_times(_rows(grad), _rows(factor).to(grad.dtype))
        return grad_x, grad_weight, _rows(grad).sum(0) if wants_bias else None, None


class _TransformableLinear(torch.autograd.Function):
    """:class:`_Linear` in the form that torch.func takes; torch binds its signature anew in every call."""

    generate_vmap_rule = True
    backward = _Linear.backward

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activated: bool) -> Tensor:
        return linear(gelu(x) if activated else x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, activated = inputs
        _keep(ctx, x, weight, activated)


def _rows(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def _transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for (M, N) and (M, K). oneDNN is fastest where the longer side of the result is its inner one."""
    if a.shape[1] > b.shape[1] and _through_onednn(b.t(), a.t(), None):
        return linear(b.t(), a.t()).t()
    return linear(a.t(), b.t())


def _through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not transformed(tensors)
        and all(map(_plain, tensors))
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.numel() * weight.shape[0] >= LEAST
        # oneDNN gets the address of a bias alone, no strides.
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )


def _plain(tensor: Tensor) -> bool:
    return (
        tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """True if float32 matrices are multiplied by oneDNN, which has to be on board, and not by MKL."""
    return torch.backends.mkldnn.is_available() and mkl_is_slow()
