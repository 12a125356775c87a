"""Public function, schema, checks and autograd of soft_codebook."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import FLOATING, accumulation_dtype, autocast_dtype, check_same, check_tensor
from .._library import Op
from ..codebook_statistics.op import check_index
from . import reference


class SoftCode(NamedTuple):
    """Result of :func:`soft_codebook`: ``code`` (N, C); ``nll`` and ``p_target`` (N,), None without a target."""

    code: Tensor
    nll: Tensor | None
    p_target: Tensor | None


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None = None, *, implementation: str = "auto"
) -> SoftCode:
    """Codebook average under softmax(logits), and the probability of the true code.

    Args:
        logits: (N, V) float32, bfloat16 or float16 (float64 in the reference).
        codebook: (V, C), dtype of ``logits``; under autocast any but float64, and ``code`` takes that dtype.
        target: (N,) int64, the true code of each row, in 0..V - 1. On a GPU, where values are not looked at, another
            one gives NaN.

    Returns:
        :class:`SoftCode` with ``code = softmax(logits) @ codebook`` in the dtype of ``codebook``,
        ``nll = -log softmax(logits)[target]`` and ``p_target = exp(-nll)`` in float32, all differentiable with respect
        to logits and codebook. Accumulation is in float32.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also a target out of range.
    """
    arguments = logits, codebook, target, implementation
    if not is_dynamo_compiling() and (found := _known.call(*arguments)) is not None:
        return found
    check_tensor("logits", logits, dtype=FLOATING, ndim=2)
    if logits.shape[1] == 0:
        raise ValueError("logits: expected at least 1 code, got shape (N, 0)")
    check_tensor("codebook", codebook, dtype=FLOATING, shape=(logits.shape[1], None))
    if target is not None:
        check_tensor("target", target, dtype=torch.int64, shape=logits.shape[:1])
    double = torch.float64 in (logits.dtype, codebook.dtype)
    if double or autocast_dtype(logits.device.type) is None:
        check_same("dtype", logits=logits, codebook=codebook)
    check_same("device", logits=logits, codebook=codebook, target=target)
    return _known.first(arguments, arguments[:-1], _code_alone if target is None else _soft_code)


def _soft_code(results: Any) -> SoftCode:
    return SoftCode(*results[:3])


def _code_alone(results: Any) -> SoftCode:
    return SoftCode(results[0], None, None)


def _fake(logits: Tensor, codebook: Tensor, target: Tensor | None) -> tuple[Tensor, ...]:
    rows, dtype = 0 if target is None else logits.shape[0], accumulation_dtype(logits)
    code = codebook.new_empty((logits.shape[0], codebook.shape[1]))
    sizes = ((rows,), (rows,), (2, logits.shape[0]))
    return code, *(logits.new_empty(size, dtype=dtype) for size in sizes)


def _check(logits: Tensor, codebook: Tensor, target: Tensor | None) -> None:
    if target is not None:
        check_index("target", target, logits.shape[1])


_soft_codebook = Op(
    # code, nll, p_target, and (2, N) normalizer, maximum and sum of exponentials of each row, with which the backward
    # reads the logits only once. (Their logarithm in one number would lose digits where logits are large.)
    "soft_codebook(Tensor logits, Tensor codebook, Tensor? target) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.soft_codebook,
    fake=_fake,
    others={
        "torch": "alit_kernels.soft_codebook.torch_:soft_codebook",
        "triton": "alit_kernels.soft_codebook.triton_:soft_codebook",
    },
    check=_check,
)
_soft_codebook_backward = Op(
    # Gradients of logits and codebook, empty where they are not wanted.
    "soft_codebook_backward(Tensor? grad_code, Tensor? grad_nll, Tensor? grad_p_target, Tensor logits,"
    " Tensor codebook, Tensor? target, Tensor code, Tensor normalizer, bool logits_wanted, bool codebook_wanted)"
    " -> (Tensor, Tensor)",
    reference=reference.soft_codebook_backward,
    fake=lambda grad_code, grad_nll, grad_p_target, logits, codebook, target, code, norm, *wanted: (
        logits.new_empty(logits.shape if wanted[0] else 0),
        codebook.new_empty(codebook.shape if wanted[1] else 0),
    ),
    others={
        "torch": "alit_kernels.soft_codebook.torch_:soft_codebook_backward",
        "triton": "alit_kernels.soft_codebook.triton_:soft_codebook_backward",
    },
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.implementation = inputs
    ctx.save_for_backward(*saved, output[0], output[3])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _, codebook, *_ = saved = ctx.saved_tensors
    logits_wanted, codebook_wanted, *_ = ctx.needs_input_grad
    moved = codebook_wanted and grads[0] is not None
    found: tuple[Tensor | None, ...] = (None, None)
    if logits_wanted or moved:
        found = _soft_codebook_backward(
            *(*grads[:3], *saved, logits_wanted, moved),
            implementation=ctx.implementation,
        )
    still = torch.zeros_like(codebook) if codebook_wanted and not moved else None
    return found[0] if logits_wanted else None, found[1] if moved else still, None


_soft_codebook.register_autograd(_backward, _setup)
_known = Public(_soft_codebook)
