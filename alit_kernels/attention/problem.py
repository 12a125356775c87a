"""Arguments of the implementations of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """The first arguments of the ops: rows, and which of them see each other.

    Attributes:
        q, k, v: (T, H, D), or (B, N, H, D) for a dense batch.
        offsets, key_offsets: (B + 1,) int32, of packed rows; None for a dense batch, the second also for keys
            that lie as the queries do.
        max_length, max_key_length: static bounds for the longest sequence.
        key_mask: (T,) or (B, N) bool, True where a key takes part.
        key_stop: (T,) or (B, N) int32, or (N,) for all of a dense batch: a query sees the keys of its sequence before
            this one.
        scale: factor on the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor | None
    key_offsets: Tensor | None
    max_length: int
    max_key_length: int
    key_mask: Tensor | None
    key_stop: Tensor | None
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> Problem:
        """Problem of the ops' arguments; without ``k`` and ``v`` all are in ``q``, (T, 3, H, D) or (B, N, 3, H, D)."""
        if k is None or v is None:
            q, k, v = q.unbind(-3)
            cls = Fused
        return cls(q, k, v, *rest)

    @property
    def ends(self) -> tuple[Any, Any]:
        """Offsets of queries and of keys, each None for a dense batch."""
        return self.offsets, self.offsets if self.key_offsets is None else self.key_offsets


class Fused(Problem):
    """Problem whose q, k and v were given as one tensor, which has one gradient."""

    __slots__ = ()
