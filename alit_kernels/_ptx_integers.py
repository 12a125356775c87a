"""Integer semantics of PTX instructions, on numpy arrays of all threads of a program."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

#: An int, an int64 array of one value for each thread, or None where it depends on data.
Value = Any


def _bits(opcode: str) -> int:
    """Width of an instruction's result in bits; 64 for predicates."""
    if ".wide." in opcode:
        return 64
    kinds = re.findall(r"\.(?:[bus](\d+)|(pred))", opcode)
    if opcode.startswith("setp") or not kinds or kinds[-1][1]:
        return 64
    return int(kinds[0 if opcode.startswith("cvt") else -1][0])


def _signed(value: Value, bits: int) -> Value:
    half = 1 << (bits - 1)
    return ((value + half) & ((1 << bits) - 1)) - half if bits < 64 else value


def wrapped(opcode: str, value: Value) -> Value:
    """``value`` as a register of the result's width holds it: unsigned below 64 bits, signed at 64, as in numpy."""
    bits = _bits(opcode)
    if bits < 64:
        return value & ((1 << bits) - 1)
    return ((value + 2**63) & (2**64 - 1)) - 2**63 if isinstance(value, int) else value


def operands(opcode: str, *values: Value) -> list[Value]:
    """``values`` as the instruction's type reads them: signed where the type is."""
    kind = re.findall(r"\.([bus])(\d+)", opcode)[-1:]
    if kind and kind[0][0] == "s":
        return [_signed(value, int(kind[0][1])) for value in values]
    return list(values)


def _typed(function: Callable[..., Value]) -> Callable[..., Value]:
    return lambda opcode, *values: function(*operands(opcode, *values))


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_COMPARED = {
    "eq": operator.eq,
    "ne": operator.ne,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}


def _compare(opcode: str, *values: Value) -> Value:
    names = opcode.split(".")
    left, right = operands(opcode, *values[:2])
    found = np.asarray(_COMPARED[names[1]](left, right)).astype(np.int64)
    if names[2] in ("and", "or", "xor"):
        found = {"and": found & values[2], "or": found | values[2], "xor": found ^ values[2]}[
            names[2]
        ]
    return int(found) if np.ndim(found) == 0 else found


def _divided(left: Value, right: Value) -> Value:
    """Quotient rounded towards 0; a divisor of 0 counts as 1."""
    sign = np.where((np.asarray(left) < 0) ^ (np.asarray(right) < 0), -1, 1)
    return sign * (np.abs(left) // np.maximum(1, np.abs(right)))


def _field(opcode: str, value: Value, first: Value, length: Value) -> Value:
    found = (value >> first) & ((1 << length) - 1)
    return _signed(found, length) if ".s" in opcode else found


def _convert(opcode: str, value: Value) -> Value:
    source = re.findall(r"\.([bus])(\d+)", opcode)[-1]
    return _signed(value, int(source[1])) if source[0] == "s" else value


def _logic(opcode: str, a: Value, b: Value, c: Value, table: int) -> Value:
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
    result: Value = 0
    for i, term in enumerate(terms):
        result = result | (term if table >> i & 1 else 0)
    return result


OPERATIONS: dict[str, Callable[..., Value]] = {
    "mov": lambda opcode, value: value,
    "add": _typed(operator.add),
    "sub": _typed(operator.sub),
    "mul": lambda opcode, a, b: (
        (x := operands(opcode, a, b))[0] * x[1] >> (32 if ".hi." in opcode else 0)
    ),
    "mad": lambda opcode, a, b, c: operator.mul(*operands(opcode, a, b)) + c,
    "min": _typed(np.minimum),
    "max": _typed(np.maximum),
    "abs": _typed(np.abs),
    "neg": _typed(operator.neg),
    "and": lambda opcode, a, b: a & b,
    "or": lambda opcode, a, b: a | b,
    "xor": lambda opcode, a, b: a ^ b,
    "not": lambda opcode, a: 1 - a if opcode.endswith("pred") else ~a,
    "shl": lambda opcode, a, b: a << np.minimum(b, 63),
    "shr": lambda opcode, a, b: operands(opcode, a)[0] >> np.minimum(b, 63),
    "div": _typed(_divided),
    "rem": _typed(lambda a, b: a - b * _divided(a, b)),
    "selp": lambda opcode, a, b, p: (
        np.where(np.asarray(p) != 0, a, b) if np.ndim(p) else a if p else b
    ),
    "setp": _compare,
    "cvt": _convert,
    "bfe": _field,
    "lop3": _logic,
}
