"""Attention masks as one number for each query: the key before which it stops, ``key_stop`` of :func:`attention`.

A mask is of this kind where every query sees a prefix of the keys. For packed rows, concatenate the stops of the
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count

Device = torch.device | str | None


def stops_causal(n: int, *, device: Device = None) -> Tensor:
    """Stops of causal attention, (n,) int32: token i sees tokens 0 to i.

    Raises:
        TypeError, ValueError: ``n`` is not an int of at least 0.
    """
    check_count("n", n)
    return torch.arange(1, n + 1, dtype=torch.int32, device=device)


def stops_prefix(n: int, prefix: int, *, device: Device = None) -> Tensor:
    """Stops (n,) int32: the first ``prefix`` tokens see each other, every later token i sees tokens 0 to i.

    Raises:
        TypeError, ValueError: not ints with 0 <= ``prefix`` <= ``n``.
    """
    check_count("prefix", prefix)
    causal = stops_causal(n, device=device)
    if prefix > n:
        raise ValueError(f"prefix: expected at most n = {n}, got {prefix}")
    return causal.clamp_(min=prefix)


def stops_blocks(sizes: Sequence[int], *, device: Device = None) -> Tensor:
    """Stops (sum(sizes),) int32: a token sees its own block and all before it.

    Args:
        sizes: tokens of each block, in order.

    Raises:
        TypeError, ValueError: not a list or tuple of ints of at least 0.
    """
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"sizes: expected a list or tuple, got {type(sizes).__name__}")
    for i, size in enumerate(sizes):
        check_count(f"sizes[{i}]", size)
    counts = torch.tensor(sizes, dtype=torch.int64)
    return counts.cumsum(0).repeat_interleave(counts).to(device, torch.int32)


def stops_of(mask: Tensor) -> Tensor | None:
    """Stops of a mask; None if some query sees a key but not all before it.

    Args:
        mask: (N, M) on the CPU, N and M at least 1: bool, True where a query sees a key, or floating point, 0 there and
            -inf elsewhere. A mask with other numbers has no stops, nor has a floating-point one with a query that sees
            no key.

    Returns:
        (N,) int32.
    """
    # numpy compares with a number six times faster than torch does.
    plain = mask.dtype in (torch.bool, torch.float32)
    values = (mask if plain else mask.float()).resolve_neg().numpy()
    for rows in (values[:1], values[-1:], values):  # rows at the ends rule out most masks
        seen = rows if rows.dtype == bool else rows == 0
        if (seen[:, 1:] > seen[:, :-1]).any():
            return None
        if seen is not rows:
            others = rows.size - np.count_nonzero(seen)
            if np.count_nonzero(rows == -np.inf) != others or not seen[:, 0].all():
                return None
    stops = np.where(seen[:, -1], seen.shape[1], seen.argmin(1))
    return torch.from_numpy(stops.astype(np.int32))
