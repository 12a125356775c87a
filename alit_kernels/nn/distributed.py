"""Sums over the processes of data-parallel training, started in one place and awaited in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional


class Group:
    """A process group that a module keeps: a copy of the module has the same, an unpickled one the default group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: expected a group or None, got {type(group).__name__}")
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (None,)


def world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of processes; (0, 1) where ``torch.distributed`` is not initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class Reduction:
    """One all-reduce (sum) of several float32 tensors. ``travels``: it is under way, and :meth:`results` waits for it.

    The wait is the device's, not the host's, where the backend has streams. Compiled code has no handle to keep: there
    the collective is one of the graph's nodes.
    """

    def __init__(self, parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        self._parts, self._work = parts, None
        if world(group)[1] == 1:
            return
        together = torch.cat([part.flatten() for part in parts])
        if torch.compiler.is_compiling():
            group = dist.group.WORLD if group is None else group
            assert group is not None
            together = functional.all_reduce(together, "sum", group)
        else:
            self._work = dist.all_reduce(together, group=group, async_op=True)
        pieces = together.split([part.numel() for part in parts])
        self._parts = [x.view_as(part) for x, part in zip(pieces, parts, strict=True)]

    @property
    def travels(self) -> bool:
        return self._work is not None

    def results(self) -> Sequence[Tensor]:
        """The sums, in the order of the parts."""
        if self._work is not None:
            self._work.wait()
        return self._parts
