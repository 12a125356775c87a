"""Public functions, schemas, checks and autograd of the attention ops.

One op serves both public functions: with ``offsets`` the rows are packed, without (None) they are a dense batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import (
    FLOATING,
    accumulation_dtype,
    autocast_dtype,
    check_count,
    check_flag,
    check_number,
    check_offsets,
    check_offsets_shape,
    check_same,
    check_shape,
    check_tensor,
    shown,
)
from .._library import Op
from . import products, reference
from .configurations import MAX_HEAD_DIM, WIDE_SHARED
from .layout import empty_gradients, empty_rows, empty_sums
from .problem import Problem


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_stop: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: ``softmax(scale q k^T) v`` per head.

    Tokens stand before heads. Given (B, H, N, D), as torch's ``scaled_dot_product_attention`` has it, this attends
    among heads, and no shape tells: use :func:`alit_kernels.scaled_dot_product_attention` there.

    Args:
        q: (B, N, H, D) float32, bfloat16 or float16 (float64 in the reference).
        k, v: (B, M, H, D), dtype of ``q``.
        key_mask: (B, M) bool, True where a key takes part; masked keys are not read and get zero gradients.
        key_stop: (N,) or (B, N) int32: query i sees keys 0 to ``key_stop[i] - 1``, of those that take part. Clamped to
            0..M; in any order. Causal, prefix and block-causal masks are stops (:func:`stops_causal` and others).
        scale: factor on the scores; 1/sqrt(D) by default.
        return_lse: also return the log-sum-exp of the scaled scores, which is differentiable.

    Returns:
        (B, N, H, D) in the dtype of ``q``; with ``return_lse`` also (B, H, N) float32. A query without any key gives
        zeros, zero gradients and a log-sum-exp of -inf. Accumulation is in float32.

    Under autocast the inputs are cast to the autocast dtype, but for float64, which stays.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    arguments = q, k, v, key_mask, key_stop, scale, return_lse, implementation
    if not is_dynamo_compiling() and (found := _dense.call(*arguments)) is not None:
        return found
    if key_mask is key_stop is None and not return_lse and products.fit(q, k, v, implementation):
        return products.attention(q, k, v, _scale(scale, q))
    q, k, v = _cast_for_autocast(q, k, v)
    check_shape("q", q, ndim=4)
    _check_keys(q, k, v, key_mask, key_stop, (q.shape[0], None))
    check_flag("return_lse", return_lse)
    lengths = q.shape[1], k.shape[1]
    values = q, k, v, None, None, *lengths, key_mask, key_stop, _scale(scale, q)
    return _dense.first(arguments, values, None if return_lse else _output)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    max_length: int,
    max_key_length: int | None = None,
    key_mask: Tensor | None = None,
    key_stop: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each of B packed sequences.

    Args:
        q: (T, H, D) float32, bfloat16 or float16 (float64 in the reference).
        k, v: (T', H, D), dtype of ``q``; T' = T unless ``key_offsets`` is given.
        offsets: (B + 1,) int32 on the device: sequence b is rows ``offsets[b]`` to ``offsets[b + 1] - 1``. T may exceed
            ``offsets[-1]``; what lies beyond is never read, and is zero in the output and in the gradients.
        key_offsets: (B + 1,) int32, the sequences of the keys (cross-attention); ``offsets`` by default.
        max_length, max_key_length: static bounds for the longest sequence; the latter defaults to ``max_length``.
        key_mask: (T',) bool, True where a key takes part.
        key_stop: (T,) int32: a query sees the keys of its sequence before this one, counted from that sequence's first,
            of those that take part. Clamped to 0 and the number of the sequence's keys; in any order.
        scale: factor on the scores; 1/sqrt(D) by default.
        return_lse: also return the log-sum-exp of the scaled scores, which is differentiable.

    Returns:
        (T, H, D) in the dtype of ``q``; with ``return_lse`` also (H, T) float32. Accumulation is in float32.

    Under autocast the inputs are cast to the autocast dtype, but for float64, which stays.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU also offsets or bounds that do not fit.
    """
    problem = q, k, v, offsets, key_offsets, max_length, max_key_length, key_mask, key_stop, scale
    arguments = *problem, return_lse, implementation
    if not is_dynamo_compiling() and (found := _packed.call(*arguments)) is not None:
        return found
    q, k, v = _cast_for_autocast(q, k, v)
    check_shape("q", q, ndim=3)
    check_offsets_shape(offsets)
    if key_offsets is not None:
        check_tensor("key_offsets", key_offsets, dtype=torch.int32, shape=offsets.shape)
    key_rows = q.shape[0] if key_offsets is None else None
    _check_keys(q, k, v, key_mask, key_stop, (key_rows,), offsets=offsets, key_offsets=key_offsets)
    check_count("max_length", max_length)
    if max_key_length is None:
        max_key_length = max_length
    check_count("max_key_length", max_key_length)
    check_flag("return_lse", return_lse)
    lengths = max_length, max_key_length
    values = q, k, v, offsets, key_offsets, *lengths, key_mask, key_stop, _scale(scale, q)
    return _packed.first(arguments, values, None if return_lse else _output)


def self_attention(
    qkv: Tensor,
    offsets: Tensor | None = None,
    *,
    max_length: int = 0,
    implementation: str = "auto",
) -> Tensor:
    """Self-attention of queries, keys and values that are one tensor, as is their gradient.

    Args:
        qkv: (B, N, 3, H, D); with ``offsets`` packed rows, (T, 3, H, D).
        offsets, max_length: as for :func:`varlen_attention`.

    Returns:
        (B, N, H, D) or (T, H, D), as :func:`attention` or :func:`varlen_attention` of the three.

    Raises:
        TypeError, ValueError: as there.
    """
    arguments = qkv, offsets, max_length, implementation
    if not is_dynamo_compiling() and (found := _fused.call(*arguments)) is not None:
        return found
    check_tensor("qkv", qkv, dtype=FLOATING, ndim=5 if offsets is None else 4)
    check_shape("qkv", qkv, shape=(*[None] * (qkv.ndim - 3), 3, None, None))
    if offsets is None:
        max_length = qkv.shape[1]
    else:
        check_offsets_shape(offsets)
        check_same("device", qkv=qkv, offsets=offsets)
        check_count("max_length", max_length)
    dtype = autocast_dtype(qkv.device.type)
    if dtype is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
    lengths, scale = (max_length, max_length), _scale(None, qkv)
    values = qkv, None, None, offsets, None, *lengths, None, None, scale
    return _fused.first(arguments, values, _output)


def _output(results: tuple[Tensor, Tensor]) -> Tensor:
    """The output, without the log-sum-exp."""
    return results[0]


def attention_map(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    offsets: Tensor,
    *,
    queries: range,
    keys: range,
    max_length: int,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attention probabilities of a block of queries and keys, averaged over heads, recomputed from the log-sum-exp.

    Args:
        q, k: (T, H, D), as given to :func:`varlen_attention`.
        lse: (H, T) float32, as it returned them.
        offsets: (B + 1,) int32.
        queries, keys: positions within each sequence, ``range(start, stop)`` within ``max_length``, step 1.
        max_length: static bound for the longest sequence.
        scale: as given to :func:`varlen_attention`.

    Returns:
        (B, len(queries), len(keys)) float32; zero at positions beyond a sequence's end. Not differentiable.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, a range with a step or outside ``max_length``.
    """
    check_tensor("q", q, dtype=FLOATING, ndim=3)
    check_tensor("k", k, shape=q.shape)
    check_tensor("lse", lse, dtype=accumulation_dtype(q), shape=(q.shape[1], q.shape[0]))
    check_offsets_shape(offsets)
    check_same("dtype", q=q, k=k)
    check_same("device", q=q, k=k, lse=lse, offsets=offsets)
    check_count("max_length", max_length)
    for name, block in (("queries", queries), ("keys", keys)):
        if not isinstance(block, range):
            raise TypeError(f"{name}: expected a range, got {type(block).__name__}")
        if block.step != 1 or not 0 <= block.start <= block.stop <= max_length:
            start, stop, step = map(shown, (block.start, block.stop, block.step))
            raise ValueError(
                f"{name}: expected a range of step 1 within 0..{max_length} (max_length), got"
                f" range({start}, {stop}, {step})"
            )
    return _attention_map(
        q,
        k,
        lse,
        offsets,
        queries.start,
        queries.stop,
        keys.start,
        keys.stop,
        max_length,
        _scale(scale, q),
        implementation=implementation,
    )


def _check_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_stop: Tensor | None,
    rows: tuple[int | None, ...],
    **offsets: Tensor | None,
) -> None:
    """Check keys, values, mask and stops; ``rows``: the shape that ``k`` has before its heads."""
    check_shape("k", k, shape=(*rows, *q.shape[-2:]))
    check_shape("v", v, shape=k.shape)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, dtype=torch.bool, shape=k.shape[:-2])
    if key_stop is not None:
        check_tensor("key_stop", key_stop, dtype=torch.int32)
        shared = q.ndim == 4 and key_stop.ndim == 1
        check_shape("key_stop", key_stop, shape=q.shape[shared:-2])
    check_same("dtype", q=q, k=k, v=v)
    check_same("device", q=q, k=k, v=v, **offsets, key_mask=key_mask, key_stop=key_stop)


def _scale(scale: float | None, q: Tensor) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else check_number("scale", scale)


def _cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    for name, tensor in zip("qkv", tensors, strict=True):
        check_tensor(name, tensor, dtype=FLOATING)
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_values(x: Problem) -> None:
    if x.offsets is not None:
        check_offsets("offsets", x.offsets, x.q.shape[0], x.max_length)
        name = "offsets" if x.key_offsets is None else "key_offsets"
        check_offsets(name, x.ends[1], x.k.shape[0], x.max_key_length, bound="max_key_length")


def limit(width: int, device: torch.device) -> str:
    """Reason why the Triton kernels cannot run on a device with heads of ``width`` channels; empty if they can."""
    if width > MAX_HEAD_DIM:
        return f"head dimension {width} exceeds {MAX_HEAD_DIM}"
    if width > 256 and device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin
        if shared < WIDE_SHARED:
            return f"head dimension {width} needs {WIDE_SHARED} bytes of shared memory, this GPU has {shared}"
    return ""


def _limit(q: Tensor) -> str:
    return limit(q.shape[-1], q.device)


def _no_stops(x: Problem) -> str:
    return "it knows no key_stop" if x.key_stop is not None else ""


#: Arguments of ``Problem.of``, with which the schemas of both ops begin.
_PROBLEM = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? offsets, Tensor? key_offsets, SymInt max_length, SymInt max_key_length,"
    " Tensor? key_mask, Tensor? key_stop, float scale"
)
_attention = Op(
    f"attention({_PROBLEM}) -> (Tensor, Tensor)",
    problem=Problem,
    reference=reference.attention,
    others={
        "cpp": "alit_kernels.attention.cpp:attention",
        "torch": "alit_kernels.attention.torch_:attention",
        "triton": "alit_kernels.attention.triton_:attention",
    },
    limits={"triton": lambda x: _limit(x.q), "torch": _no_stops},
    fake=lambda x: (empty_rows(x.q), empty_sums(x.q, accumulation_dtype(x.q))),
    check=_check_values,
)
_attention_backward = Op(
    # Gradients of q, k and v; of q alone unless the keys' are wanted; one where the three were one tensor.
    f"attention_backward({_PROBLEM}, Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool keys_wanted)"
    " -> Tensor[]",
    problem=Problem,
    reference=reference.attention_backward,
    others={
        "cpp": "alit_kernels.attention.cpp:attention_backward",
        "torch": "alit_kernels.attention.torch_:attention_backward",
        "triton": "alit_kernels.attention.triton_:attention_backward",
    },
    limits={"triton": lambda x, *rest: _limit(x.q), "torch": lambda x, *rest: _no_stops(x)},
    fake=lambda x, *rest: empty_gradients(x, rest[-1])[0],
)
_attention_map = Op(
    "attention_map(Tensor q, Tensor k, Tensor lse, Tensor offsets, SymInt query_start, SymInt query_stop,"
    " SymInt key_start, SymInt key_stop, SymInt max_length, float scale) -> Tensor",
    reference=reference.attention_map,
    others={"triton": "alit_kernels.attention.triton_:attention_map"},
    limits={"triton": lambda q, *rest: _limit(q)},
    fake=lambda q, k, lse, offsets, query_start, query_stop, key_start, key_stop, *rest: (
        q.new_empty(
            (offsets.shape[0] - 1, query_stop - query_start, key_stop - key_start),
            dtype=accumulation_dtype(q),
        )
    ),
    check=lambda q, k, lse, offsets, a, b, c, d, max_length, scale: check_offsets(
        "offsets", offsets, q.shape[0], max_length
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *problem, ctx.implementation = inputs
    *tensors, ctx.max_length, ctx.max_key_length, key_mask, key_stop, ctx.scale = problem
    ctx.save_for_backward(*tensors, key_mask, key_stop, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, offsets, key_offsets, key_mask, key_stop, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _attention_backward(
        q,
        k,
        v,
        offsets,
        key_offsets,
        ctx.max_length,
        ctx.max_key_length,
        key_mask,
        key_stop,
        ctx.scale,
        grad_out,
        grad_lse,
        out,
        lse,
        k is None or any(ctx.needs_input_grad[1:3]),
        implementation=ctx.implementation,
    )
    return (*grads, *[None] * (10 - len(grads)))


_attention.register_autograd(_backward, _setup)
_dense, _packed, _fused = Public(_attention), Public(_attention), Public(_attention)
