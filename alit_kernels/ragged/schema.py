"""The ragged ops: schemas, outputs, checks of values on the CPU, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_offsets
from .._cpp import TYPES
from .._library import Op
from . import cpp, cuda, reference


def _check_lengths(lengths: Tensor) -> list[int]:
    values: list[int] = lengths.tolist()  # their sum in Python does not wrap
    if values and min(values) < 0:
        raise ValueError(f"lengths: expected at least 0, got {min(values)}")
    if sum(values) >= 2**31:
        raise ValueError(f"lengths: expected a sum below 2^31, got {sum(values)}")
    return values


def _check_pack(padded: Tensor, lengths: Tensor, capacity: int) -> None:
    values = _check_lengths(lengths)
    if values and max(values) > padded.shape[1]:
        raise ValueError(f"lengths: expected at most N = {padded.shape[1]}, got {max(values)}")
    _check_capacity(capacity, sum(values))


def _check_capacity(capacity: int, needed: int) -> None:
    if needed > capacity:
        raise ValueError(f"capacity: expected at least {needed} rows, got {capacity}")


def _check_compact(packed: Tensor, offsets: Tensor, keep: Tensor, capacity: int) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    _check_capacity(capacity, int(keep[: int(offsets[-1])].sum()))


def _check_append(
    packed: Tensor, offsets: Tensor, rows: Tensor, select: Tensor | None, capacity: int
) -> None:
    check_offsets("offsets", offsets, packed.shape[0])
    chosen = offsets.shape[0] - 1 if select is None else int(select.sum())
    _check_capacity(capacity, int(offsets[-1]) + chosen * rows.shape[rows.ndim - packed.ndim])


def _unsummed(grad: Tensor, *rest: Any) -> str:
    """Reason why gradients of shared rows cannot be summed in their dtype; empty if they can, or are only moved."""
    *_, shared, _, wanted = rest
    unknown = shared and wanted and grad.dtype not in TYPES
    return f"{grad.dtype} gradients of shared rows" if unknown else ""


def _op(schema: str, outputs: Callable[..., Any], **options: Any) -> Op:
    """Op whose implementations have its name; ``outputs`` allocates for them, and is the fake."""
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
    "pack(Tensor padded, Tensor lengths, SymInt capacity) -> (Tensor, Tensor)",
    lambda padded, lengths, capacity: (
        padded.new_empty((capacity, *padded.shape[2:])),
        lengths.new_empty(lengths.shape[0] + 1, dtype=torch.int32),
    ),
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
unpack_backward = _op(
    "unpack_backward(Tensor grad, Tensor offsets, SymInt rows) -> Tensor",
    lambda grad, offsets, rows: grad.new_empty((rows, *grad.shape[2:])),
)
compact = _op(
    # Besides what the public function returns: the output row of each input row, -1 where it is dropped.
    "compact(Tensor packed, Tensor offsets, Tensor keep, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda packed, offsets, keep, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        offsets.new_empty(offsets.shape),
        offsets.new_empty(capacity),
        offsets.new_empty(packed.shape[0]),
    ),
    check=_check_compact,
)
compact_backward = _op(
    "compact_backward(Tensor grad, Tensor target_row) -> Tensor",
    lambda grad, target_row: grad.new_empty((target_row.shape[0], *grad.shape[1:])),
)
append = _op(
    "append(Tensor packed, Tensor offsets, Tensor rows, Tensor? select, SymInt capacity) -> (Tensor, Tensor)",
    lambda packed, offsets, rows, select, capacity: (
        packed.new_empty((capacity, *packed.shape[1:])),
        offsets.new_empty(offsets.shape),
    ),
    check=_check_append,
)
append_backward = _op(
    # Gradients of packed and of rows; empty where they are not wanted.
    "append_backward(Tensor grad, Tensor offsets, Tensor new_offsets, Tensor? select, SymInt rows, SymInt added,"
    " bool shared, bool packed_wanted, bool rows_wanted) -> (Tensor, Tensor)",
    lambda grad, offsets, new_offsets, select, rows, added, shared, packed_wanted, rows_wanted: (
        grad.new_empty((rows, *grad.shape[1:]) if packed_wanted else 0),
        grad.new_empty(
            (*(() if shared else (offsets.shape[0] - 1,)), added, *grad.shape[1:])
            if rows_wanted
            else 0
        ),
    ),
    limits={"cpp": _unsummed, "cuda": _unsummed},
)
tail_mask = _op(
    "tail_mask(Tensor tokens, Tensor lengths, Tensor fill) -> Tensor",
    lambda tokens, lengths, fill: tokens.new_empty(tokens.shape),
)
tail_mask_backward = _op(
    # Gradients of tokens and of fill; empty where they are not wanted.
    "tail_mask_backward(Tensor grad, Tensor lengths, bool tokens_wanted, bool fill_wanted) -> (Tensor, Tensor)",
    lambda grad, lengths, tokens_wanted, fill_wanted: (
        grad.new_empty(grad.shape if tokens_wanted else 0),
        grad.new_empty(grad.shape[2:] if fill_wanted else 0),
    ),
)


def _differentiable(
    op: Op, backward: Op, setup: Callable[[Any, Sequence[Any], Any], None], others: int
) -> None:
    """Make ``op`` differentiable: ``backward`` maps output 0's gradient to input 0's; ``others`` more inputs get none.

    Args:
        setup: saves the tensors that ``backward`` takes besides, and in ``ctx.rest`` numbers and the implementation.
    """
    nothing = (None,) * others

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *numbers, implementation = ctx.rest
        found = backward(grad, *ctx.saved_tensors, *numbers, implementation=implementation)
        return found, *nothing

    op.register_autograd(gradients, setup)


def _setup_pack(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rest = inputs[0].shape[1], 0.0, inputs[-1]


def _setup_unpack(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[0].shape[0], inputs[-1]


def _setup_unpack_backward(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[0].shape[1], 0.0, inputs[-1]


def _setup_compact(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.rest = (inputs[-1],)


_differentiable(pack, unpack, _setup_pack, 2)
_differentiable(unpack, unpack_backward, _setup_unpack, 3)
_differentiable(unpack_backward, unpack, _setup_unpack_backward, 2)
_differentiable(compact, compact_backward, _setup_compact, 3)


def _setup_append(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    packed, offsets, rows, select, _, ctx.implementation = inputs
    ctx.save_for_backward(offsets, output[1], select)
    leading = rows.ndim - packed.ndim
    ctx.numbers = packed.shape[0], rows.shape[leading], leading == 0


def _append_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    arguments = (*ctx.saved_tensors, *ctx.numbers, *wanted)
    found = append_backward(grad, *arguments, implementation=ctx.implementation)
    packed, rows = (x if wants else None for x, wants in zip(found, wanted, strict=True))
    return packed, None, rows, None, None


append.register_autograd(_append_backward, _setup_append)


def _setup_tail_mask(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.implementation = inputs[-1]


def _tail_mask_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    arguments = (*ctx.saved_tensors, *wanted)
    found = tail_mask_backward(grad, *arguments, implementation=ctx.implementation)
    tokens, fill = (x if wants else None for x, wants in zip(found, wanted, strict=True))
    return tokens, None, fill


tail_mask.register_autograd(_tail_mask_backward, _setup_tail_mask)
