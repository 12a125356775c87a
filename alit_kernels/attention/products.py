"""Wide heads on a CPU, such as the one of a VQGAN's attention: two products of torch's and a softmax between them.

A kernel that keeps no scores computes them again in its backward, a seventh product beside six, and at 256 channels and
more products are nearly all there is to do. Here the probabilities are kept: B H N M numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._calls import requested
from .._checks import autocast_dtype
from .._cpu import mkl_is_slow
from .._plain import is_plain, watched

#: Minimum channels of a head for keeping the probabilities to pay, and most scores of a head for which they are kept.
LEAST_WIDTH, MOST_SCORES = 256, 2**20


def fit(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> bool:
    """True if a dense call without mask, stops and log-sum-exp is computed here: float32 on a CPU, wide heads.

    On AMD's processors with AVX-512 our kernels are faster than torch's products. Arguments that are wrong give False;
    the caller's checks report them.
    """
    if not is_plain(q, k, v) or not q.is_cpu or torch.compiler.is_compiling():
        return False
    shape, keys = q.shape, k.shape
    return (
        len(shape) == 4
        and shape[3] >= LEAST_WIDTH
        and q.dtype == k.dtype == v.dtype == torch.float32
        and keys == v.shape
        and (*keys[:1], *keys[2:]) == (*shape[:1], *shape[2:])
        and shape[1] * keys[1] <= MOST_SCORES
        and k.is_cpu
        and v.is_cpu
        and requested(implementation) == "auto"
        and autocast_dtype("cpu") is None
        and not watched()
        and not mkl_is_slow()
    )


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of (B, N, H, D) float32 queries and (B, M, H, D) keys and values: (B, N, H, D)."""
    batch, _, heads, _ = q.shape
    rows: Any = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = _Products.apply(*rows, scale)
    return out.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


class _Products(torch.autograd.Function):
    """Autograd function P V. With P = softmax(scale Q K^T) and dS = P (dO V^T - rowsum(P dO V^T)):
    dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        p = _scaled(scale, q, k.transpose(1, 2)).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        wants_q, wants_k, wants_v, _ = ctx.needs_input_grad
        grad_q = grad_k = grad_v = None
        with torch.autocast(
            "cpu", enabled=False
        ):  # which may be on here, and was off in the forward
            if wants_v:
                grad_v = torch.bmm(p.transpose(1, 2), grad)
            if wants_q or wants_k:
                grad_p = torch.bmm(grad, v.transpose(1, 2))
                grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
                grad_q = _scaled(ctx.scale, grad_s, k) if wants_q else None
                grad_k = _scaled(ctx.scale, grad_s.transpose(1, 2), q) if wants_k else None
        return grad_q, grad_k, grad_v, None


def _scaled(factor: float, a: Tensor, b: Tensor) -> Tensor:
    """``factor`` times the batched matrix product a b."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)
