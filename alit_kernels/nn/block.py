"""Pre-norm transformer block as one autograd function, for sequences so short that the host takes most of the time.

Every addition of a residual connection is left to the layer norm behind it, of the next block too, and so is the bias
before it (:func:`alit_kernels.add_layer_norm`). A recurrent model calls each block many times before the backward:
all calls of a graph share one copy of the parameters in the dtype of products, and each adds its gradients to one total
in the parameters' own, in the product that computes them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from .._checks import autocast_dtype
from ..add_layer_norm.op import backward as norm_backward
from ..add_layer_norm.op import forward as norm
from ..attention.op import _attention, _attention_backward

#: Device types where kernels are so short that their launches count. AMD's GPUs run no kernel of ours.
DEVICES = set() if torch.version.hip else {"cuda"}
#: Backward pass, by the number that the engine gives it -> the totals of gradients so far.
Totals = dict[int, list[Any]]


class Branch(NamedTuple):
    """Branch that is still to be added to rows x: ``rows`` of their shape, and ``bias`` (C,)."""

    rows: Tensor
    bias: Tensor


class Parameters(NamedTuple):
    """Parameters of a block: layer norms, the products of ``nn.SelfAttention``, and the two layers of an MLP.

    ``bias_before`` is that of the branch which the block before it left; the bias of its own is left to the next.
    """

    norm_1_weight: Tensor
    norm_1_bias: Tensor
    bias_before: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    out_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    last_weight: Tensor


class Options(NamedTuple):
    """Numbers that a block needs; ``max_length`` is None for dense rows."""

    heads: int
    eps_1: float
    eps_2: float
    max_length: int | None


def in_the_open(x: Tensor) -> bool:
    """True if x is on a GPU, gradients are recorded, and nothing traces or transforms what is computed from it."""
    return (
        x.device.type in DEVICES
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
    )


def block(
    x: Tensor,
    branch: Branch | None,
    offsets: Tensor | None,
    parameters: Parameters,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """x + branch + attention of its norm, and an MLP of the norm of that, without its last bias.

    Args:
        x: (B, N, C), or packed rows (T, C) with ``offsets``, as for :func:`alit_kernels.varlen_attention`;
            :func:`in_the_open`.

    Returns:
        Rows, and those of a branch that is still to be added to them; None where a parameter gets no gradient, or is no
        ``torch.nn.Parameter``: then the layers have to be called.
    """
    dtype = autocast_dtype(x.device.type) or parameters.qkv_weight.dtype
    known = _shared(parameters, dtype)
    if known is None:
        return None
    rows = None if branch is None else branch.rows
    return _Block.apply(x, rows, offsets, options, *known)


class _Block(torch.autograd.Function):
    """Autograd function of a block on rows (T, C). Gradients of parameters go to ``totals``: autograd gets none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        offsets: Tensor | None,
        options: Options,
        totals: Totals,
        *copies: Any,
    ) -> tuple[Tensor, Tensor]:
        p, shape = Parameters(*copies), x.shape
        dtype = p.qkv_weight.dtype
        ctx.options, ctx.totals, ctx.shape = options, totals, shape
        ctx.dtypes = x.dtype, x.dtype if branch is None else branch.dtype
        # All is in one dtype already: products need not ask.
        device, autocast = x.device.type, autocast_dtype(x.device.type) is not None
        torch.set_autocast_enabled(device, False)
        try:
            x = x.flatten(0, -2)
            total_1, normal_1, stats_1 = norm(
                *(x, None if branch is None else branch.flatten(0, -2), p.bias_before),
                *(p.norm_1_weight, p.norm_1_bias, options.eps_1, dtype),
            )
            total_1 = x if branch is None else total_1
            qkv = linear(normal_1, p.qkv_weight, p.qkv_bias)
            out, lse = _attention(*_problem(qkv, shape, offsets, options))
            attended = linear(out.view(normal_1.shape), p.out_weight)
            total_2, normal_2, stats_2 = norm(
                *(total_1, attended, p.out_bias),
                *(p.norm_2_weight, p.norm_2_bias, options.eps_2, dtype),
            )
            hidden = linear(normal_2, p.hidden_weight, p.hidden_bias)
            rows = linear(gelu(hidden), p.last_weight)
        finally:
            torch.set_autocast_enabled(device, autocast)
        ctx.save_for_backward(
            *(offsets, total_1, normal_1, stats_1, qkv, out, lse, total_2, normal_2, stats_2),
            *(hidden, *copies),
        )
        return total_2.view(shape), rows.view(shape)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_branch: Tensor) -> tuple[Tensor | None, ...]:
        offsets, total_1, normal_1, stats_1, qkv, out, lse, *rest = ctx.saved_tensors
        total_2, normal_2, stats_2, hidden, *copies = rest
        p, task = Parameters(*copies), torch._C._current_graph_task_id()
        of_norm_1, of_qkv, of_qkv_bias, of_out, of_norm_2, of_hidden, of_hidden_bias, of_last = (
            ctx.totals.get(task) or [None] * 8
        )
        grad_total, grad = grad_total.flatten(0, -2), grad_branch.flatten(0, -2)
        of_last = _plus(of_last, grad, gelu(hidden))
        grad = torch.ops.aten.gelu_backward(torch.mm(grad, p.last_weight), hidden)
        of_hidden, of_hidden_bias = _plus(of_hidden, grad, normal_2), _sum(of_hidden_bias, grad)
        grad_total, grad, of_norm_2 = norm_backward(
            *(grad_total, torch.mm(grad, p.hidden_weight), total_2, p.norm_2_weight, stats_2),
            *(of_norm_2, total_1.dtype, normal_1.dtype),
        )
        if total_1.dtype == normal_1.dtype:
            grad = grad_total
        of_out = _plus(of_out, grad, out.view(normal_1.shape))
        grad = torch.mm(grad, p.out_weight).view(out.shape)
        problem = _problem(qkv, ctx.shape, offsets, ctx.options)
        (grad,) = _attention_backward(*problem, grad, None, out, lse, True)
        grad = grad.view(qkv.shape)
        of_qkv, of_qkv_bias = _plus(of_qkv, grad, normal_1), _sum(of_qkv_bias, grad)
        grad_x, grad, of_norm_1 = norm_backward(
            *(grad_total, torch.mm(grad, p.qkv_weight), total_1, p.norm_1_weight, stats_1),
            *(of_norm_1, *ctx.dtypes),
        )
        ctx.totals[task] = [
            *(of_norm_1, of_qkv, of_qkv_bias, of_out, of_norm_2),
            *(of_hidden, of_hidden_bias, of_last),
        ]
        grad_x = grad_x.view(ctx.shape)
        if p.bias_before is None:
            return grad_x, *NOTHING
        same = ctx.dtypes[0] == ctx.dtypes[1]
        return grad_x, grad_x if same else grad.view(ctx.shape), *NOTHING[1:]


NOTHING = (None,) * (len(Parameters._fields) + 4)


def _problem(
    qkv: Tensor, shape: torch.Size, offsets: Tensor | None, options: Options
) -> tuple[Any, ...]:
    """Arguments of the attention ops for fused queries, keys and values."""
    width = shape[-1] // options.heads
    length = shape[-2] if options.max_length is None else options.max_length
    qkv = qkv.view(*shape[:-1], 3, options.heads, width)
    return qkv, None, None, offsets, None, length, length, None, None, width**-0.5


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a^T b``, in place where no gradient is recorded. Half precision is summed in float32."""
    half = a.dtype in HALF
    # Only CUDA multiplies into another dtype.
    if torch.is_grad_enabled() or (half and not a.is_cuda):
        found = a.t() @ b
        found = found.float() if half else found
        return found if total is None else total + found
    wider: Any = {"out_dtype": torch.float32} if half else {}
    if total is None:
        return torch.mm(a.t(), b, **wider)
    return torch.addmm(total, a.t(), b, out=total, **wider)


HALF = torch.bfloat16, torch.float16


def _sum(total: Tensor | None, rows: Tensor) -> Tensor:
    found = rows.sum(0, dtype=torch.float32 if rows.dtype in HALF else None)
    return found if total is None else total + found


class _Known(NamedTuple):
    """Copies of parameters and their totals; ``first`` lives as long as a graph that holds it."""

    made_of: tuple[Any, ...]
    totals: Totals
    first: weakref.ref[Tensor]
    others: list[Tensor | None]


#: Copies of parameters by the first parameter's id.
_known: dict[int, _Known] = {}


def _shared(parameters: Parameters, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Totals and copies of parameters: the same while a graph holds them and none is written; None where one gets no
    gradient.
    """
    ids = list(map(id, parameters))
    versions = [-1 if p is None or not p.requires_grad else p._version for p in parameters]
    # A CUDA graph has to make its own copies in every replay.
    captured = parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()
    made_of = ids, versions, dtype, captured
    known = _known.get(ids[0])
    if known is not None and known.made_of == made_of:
        first = known.first()
        if first is not None:
            return known.totals, first, *known.others
    if not all(p is None or _learns(p) for p in parameters):
        return None
    totals: Totals = {}
    first, *others = _Copies.apply(totals, dtype, *parameters)

    def forget(reference: weakref.ref[Tensor]) -> None:
        if ids[0] in _known and _known[ids[0]].first is reference:
            del _known[ids[0]]

    _known[ids[0]] = _Known(made_of, totals, weakref.ref(first, forget), others)
    return totals, first, *others


def _learns(p: Tensor) -> bool:
    return type(p) is nn.Parameter and p.requires_grad and p.is_leaf


#: Parameters that are cast for products; the others go to layer norms, which take any dtype.
OF_PRODUCTS = {
    *("qkv_weight", "qkv_bias", "out_weight", "hidden_weight", "hidden_bias", "last_weight")
}


class _Copies(torch.autograd.Function):
    """Autograd function of the copies: matrices and their biases in the dtype of products. Its backward runs last."""

    @staticmethod
    def forward(
        ctx: Any, totals: Totals, dtype: torch.dtype, *parameters: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.totals, ctx.dtypes = totals, [None if x is None else x.dtype for x in parameters]
        return tuple(
            x
            if x is None
            else x.to(dtype)
            if name in OF_PRODUCTS and x.dtype != dtype
            else x.view_as(x)
            for name, x in Parameters(*parameters)._asdict().items()
        )

    @staticmethod
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, ...]:
        found = ctx.totals.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return None, None, *[None] * len(ctx.dtypes)
        of_norm_1, of_qkv, of_qkv_bias, of_out, of_norm_2, *others = found
        totals = (*of_norm_1, of_qkv, of_qkv_bias, of_out, *of_norm_2, *others)
        pairs = zip(totals, ctx.dtypes, strict=True)
        return None, None, *(None if dtype is None else x.to(dtype) for x, dtype in pairs)
