"""Argument checks shared by the ops. Each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor: Any,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
) -> None:
    """Check type, layout, dtype, number of dimensions and shape (None in ``shape`` admits any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    # Properties that a dtype does not tell; quantized tensors have dtypes of their own.
    if (
        tensor.layout is not torch.strided
        or tensor.is_nested
        or (dtype is None and tensor.is_quantized)
        or (type(tensor) is not Tensor and is_sharded(tensor))
    ):
        raise TypeError(f"{name}: expected a dense tensor, got {_kind(tensor)}")
    if dtype is not None:
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"{name}: expected dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}"
            )
    if ndim is not None or shape is not None:
        check_shape(name, tensor, ndim=ndim, shape=shape)


def check_shape(
    name: str, tensor: Tensor, *, ndim: int | None = None, shape: Sequence[int | None] | None = None
) -> None:
    """Check number of dimensions and shape of a tensor that :func:`check_tensor` has accepted."""
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")
    if shape is not None:
        sizes = tensor.shape
        fits = len(sizes) == len(shape) and all(
            want is None or have == want for have, want in zip(sizes, shape, strict=True)
        )
        if not fits:
            expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(sizes)}")


def is_sharded(tensor: Tensor) -> bool:
    """True if ``tensor`` is a DTensor, of which other processes hold parts; does not import its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _kind(tensor: Tensor) -> str:
    """Description, for a message, of a tensor that is not dense."""
    if is_sharded(tensor):
        return "a DTensor; pass its full_tensor() or to_local()"
    if tensor.is_nested:
        return "a nested one"
    return "a quantized one" if tensor.is_quantized else f"layout {tensor.layout}"


def check_same(attribute: str, **tensors: Tensor | None) -> None:
    """Check that all given tensors share ``attribute`` ("dtype": TypeError, "device": ValueError)."""
    first, first_name = None, ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        value = getattr(tensor, attribute)
        if first is None:
            first, first_name = value, name
        elif value != first:
            error = TypeError if attribute == "dtype" else ValueError
            raise error(f"{name}: expected {attribute} {first} like {first_name}, got {value}")


def check_count(name: str, value: Any, *, minimum: int = 0) -> None:
    """Check a size that the caller states: a host integer of at least ``minimum``, below 2^31."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {shown(value)}")
    if isinstance(value, int) and value >= 2**31:
        raise ValueError(f"{name}: expected less than 2^31, got {shown(value)}")


def check_number(name: str, value: Any) -> float:
    """``value`` as a float, checked to be finite.

    Raises:
        TypeError: no int or float; a bool or a tensor is refused too.
        ValueError: NaN, infinite, or beyond a float64.
    """
    if type(value) is not float:
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{name}: expected a number that a float64 holds, got {shown(value)}")
        value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def check_flag(name: str, value: Any) -> None:
    """Check an option that is on or off."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_offsets_shape(offsets: Any) -> None:
    """Check type and shape of offsets of packed sequences."""
    check_tensor("offsets", offsets, dtype=torch.int32, ndim=1)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected at least one entry (B + 1), got none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check a string option."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def shown(number: int | torch.SymInt) -> str:
    """``number`` as text for a message; beyond 64 bits its size alone, since Python does not print huge numbers."""
    if isinstance(number, int) and number.bit_length() > 64:
        return f"a number of {number.bit_length()} bits"
    return str(number)


def check_offsets(
    name: str,
    offsets: Tensor,
    rows: int,
    max_length: int | None = None,
    *,
    bound: str = "max_length",
) -> None:
    """Check the values of CPU offsets: from 0, ascending, within ``rows``, no sequence above ``max_length``.

    ``bound``: name of the argument ``max_length`` in messages.
    """
    values = offsets.long()
    lengths = values.diff()
    if values[0] != 0 or (lengths < 0).any():
        raise ValueError(
            f"{name}: expected an ascending sequence that starts at 0, got {offsets.tolist()[:8]}..."
        )
    if values[-1] > rows:
        raise ValueError(
            f"{name}: expected at most {rows} rows, the number packed, got offsets up to {int(values[-1])}"
        )
    if max_length is not None and lengths.numel() and lengths.max() > max_length:
        raise ValueError(
            f"{bound}: expected at least {int(lengths.max())}, the longest of {name}, got {max_length}"
        )


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of sums: float32 for float32, bfloat16 and float16; float64 for float64 (references, gradient checks)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast uses on this device type, or None outside autocast."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
