"""The ragged ops: schemas, outputs, checks of values on the CPU, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_offsets
from .._cpp import TYPES
from .._library import Op
from . import cpp, cuda, reference


def _check_lengths(lengths: Tensor) -> None:
    if lengths.numel() and lengths.min() < 0:
        raise ValueError(f"lengths: expected at least 0, got {int(lengths.min())}")
    lengths = lengths.long()  # an int32 tensor compares with 2^31 as with -2^31
    # Only of numbers below 2^31 a tensor's sum does not wrap.
    if lengths.numel() and (lengths.max() >= 2**31 or lengths.sum() >= 2**31):
        raise ValueError(f"lengths: expected a sum below 2^31, got {sum(lengths.tolist())}")


def _check_pack(padded: Tensor, offsets: Tensor, capacity: int) -> None:
    lengths = offsets.diff()
    if lengths.numel() and lengths.max() > padded.shape[1]:
        raise ValueError(
            f"lengths: expected at most N = {padded.shape[1]}, got {int(lengths.max())}"
        )
    _check_capacity(capacity, int(offsets[-1]))


def _check_capacity(capacity: int, needed: int) -> None:
    if needed > capacity:
        raise ValueError(f"capacity: expected at least {needed} rows, got {capacity}")


def _check_compact(packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    _check_capacity(capacity, int(keep[: int(offsets[-1])].sum()))


def _check_append(
    packed: Tensor, offsets: Tensor, rows: Tensor, select: Tensor, capacity: int
) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    _check_capacity(
        capacity, int(offsets[-1]) + int(select.sum()) * rows.shape[rows.ndim - packed.ndim]
    )


def _unsummed(grad: Tensor, *rest: Any) -> str:
    """Rows of any type can be moved; those that sequences share have to be summed."""
    return f"{grad.dtype} gradients of shared rows" if rest[-1] and grad.dtype not in TYPES else ""


def _op(schema: str, outputs: Callable[..., Any], **options: Any) -> Op:
    """An op whose implementations have its name; ``outputs`` allocates, for them and as the fake."""
    name = schema.partition("(")[0]
    return Op(
        schema,
        reference=getattr(reference, name),
        fake=outputs,
        others={
            "cpp": cpp.implementation(name, outputs),
            "cuda": cuda.implementation(name, outputs),
        },
        **options,
    )


cumulative_offsets = _op(
    "cumulative_offsets(Tensor lengths) -> Tensor",
    lambda lengths: lengths.new_empty(lengths.shape[0] + 1, dtype=torch.int32),
    check=_check_lengths,
)
pack = _op(
    "pack(Tensor padded, Tensor offsets, SymInt capacity) -> Tensor",
    lambda padded, offsets, capacity: padded.new_empty((capacity, *padded.shape[2:])),
    check=_check_pack,
)
unpack = _op(
    "unpack(Tensor packed, Tensor offsets, SymInt max_length, float fill) -> Tensor",
    lambda packed, offsets, max_length, fill: packed.new_empty(
        (offsets.shape[0] - 1, max_length, *packed.shape[1:])
    ),
    check=lambda packed, offsets, max_length, fill: check_offsets(
        "offsets", offsets, packed.shape[0], max_length
    ),
)
compact = _op(
    "compact(Tensor packed, Tensor offsets, Tensor keep, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    lambda packed, offsets, keep, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        torch.empty_like(offsets),
        offsets.new_empty(capacity),
    ),
    check=_check_compact,
)
scatter_rows = _op(
    "scatter_rows(Tensor values, Tensor target_row, SymInt rows) -> Tensor",
    lambda values, target_row, rows: values.new_empty((rows, *values.shape[1:])),
)
append = _op(
    "append(Tensor packed, Tensor offsets, Tensor rows, Tensor select, SymInt capacity) -> (Tensor, Tensor)",
    lambda packed, offsets, rows, select, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        torch.empty_like(offsets),
    ),
    check=_check_append,
)
append_backward = _op(
    "append_backward(Tensor grad, Tensor offsets, Tensor new_offsets, Tensor select, SymInt rows, SymInt added,"
    " bool shared) -> (Tensor, Tensor)",
    lambda grad, offsets, new_offsets, select, rows, added, shared: (
        grad.new_empty((rows, *grad.shape[1:])),
        grad.new_empty((*(() if shared else select.shape), added, *grad.shape[1:])),
    ),
    limits={"cpp": _unsummed, "cuda": _unsummed},
)
tail_mask = _op(
    "tail_mask(Tensor tokens, Tensor lengths, Tensor fill) -> Tensor",
    lambda tokens, lengths, fill: torch.empty_like(tokens, memory_format=torch.contiguous_format),
)
tail_mask_backward = _op(
    "tail_mask_backward(Tensor grad, Tensor lengths) -> (Tensor, Tensor)",
    lambda grad, lengths: (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        grad.new_empty(grad.shape[2:]),
    ),
)


def _differentiable(
    op: Op, backward: Op, kept: Callable[..., tuple[Any, ...]], of: tuple[int, ...] = (0,)
) -> None:
    """Gradients of the inputs at the places ``of`` are what ``backward`` makes of that of the first output.

    Args:
        kept: (inputs, output) -> what ``backward`` takes besides: tensors, then numbers.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, ctx.implementation = inputs
        arguments = kept(*values, output)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers, ctx.inputs = arguments[len(tensors) :], len(values)

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        arguments = (grad, *ctx.saved_tensors, *ctx.numbers)
        found = backward(*arguments, implementation=ctx.implementation)
        by_place = dict(zip(of, found if isinstance(found, tuple) else (found,), strict=True))
        return tuple(by_place.get(place) for place in range(ctx.inputs))

    op.register_autograd(gradients, setup)


_differentiable(pack, unpack, lambda padded, offsets, *_: (offsets, padded.shape[1], 0.0))
_differentiable(unpack, pack, lambda packed, offsets, *_: (offsets, packed.shape[0]))
_differentiable(
    compact,
    scatter_rows,
    lambda packed, offsets, keep, capacity, output: (output[2], packed.shape[0]),
)
_differentiable(
    append,
    append_backward,
    lambda packed, offsets, rows, select, capacity, output: (
        offsets,
        output[1],
        select,
        packed.shape[0],
        rows.shape[rows.ndim - packed.ndim],
        rows.ndim == packed.ndim,
    ),
    of=(0, 2),
)
_differentiable(tail_mask, tail_mask_backward, lambda tokens, lengths, *_: (lengths,), of=(0, 2))
