"""Linear layers for short sequences: less memory after a GELU, and on some CPUs half the time in float32.

torch multiplies float32 matrices on a CPU by MKL, which leaves AVX-512 unused on AMD's processors. oneDNN, which torch
has on board for its convolutions, uses it. What watches torch's operators (FLOP counters, transforms, the compiler)
sees ``torch.nn.functional.linear`` as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from .._library import transformed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x W^T + b, by the faster of torch's libraries.

    Args:
        x: (..., C) of any dtype and device.
        weight: (O, C).
        bias: (O,).

    Returns:
        (..., O). It has no second derivative where oneDNN computes it.
    """
    if not _through_onednn(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias, False)
    return _times(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GELULinear(nn.Linear):
    """Linear layer after an exact GELU: ``linear(gelu(x))``.

    What the GELU returns, a quarter of what a transformer block would keep for its backward, is computed again there.
    It has no second derivative.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return _Linear.apply(x, self.weight, self.bias, True)
        return linear(gelu(x), self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """x W^T + b, or gelu(x) W^T + b where ``activated``; keeps x and W."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activated: bool) -> Tensor:
        return _times(gelu(x) if activated else x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.activated = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        # Under autocast the product is of another type than x and the weight.
        if wants_x:
            grad_x = _times(grad, weight.to(grad.dtype).t()).to(x.dtype)
            if ctx.activated:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        if wants_weight:
            factor = gelu(x) if ctx.activated else x
            grad_weight = _transposed_times(rows, factor.reshape(-1, x.shape[-1]).to(grad.dtype))
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None, None


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _through_onednn(x, weight):
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for (M, N) and (M, K). oneDNN is fastest where the longer side of the result is its inner one."""
    if _through_onednn(a, b) and a.shape[1] > b.shape[1]:
        return _times(b.t(), a.t()).t()
    return _times(a.t(), b.t())


def _through_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0 < weight.numel()  # it has no empty products
        and not transformed((x, weight))
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL on this machine: AMD processors with AVX-512."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities().get
    return bool(has("avx512_f") and has("sse4a"))  # SSE4a is AMD's alone
