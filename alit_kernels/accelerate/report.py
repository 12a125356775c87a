"""Report of :func:`alit_kernels.accelerate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Change(NamedTuple):
    """A module and its class, before and after."""

    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]


@dataclass(frozen=True)
class Swapped:
    """A module that computes by our kernels.

    Attributes:
        name: of the module in the model; empty for the model itself.
        kind: what it was recognized as.
        changes: changes of its class and of those of its parts.
    """

    name: str
    kind: str
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Left:
    """A module that looks like one that could be swapped, and why it was not touched."""

    name: str
    kind: str
    why: str


@dataclass(frozen=True)
class Report:
    """Result of :func:`accelerate`: modules swapped, modules left and why; printed, it is a table.

    Attributes:
        swapped: modules whose class was changed.
        left: modules that were not touched.
        notes: cases in which a swapped module is not called.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...] = ()

    def undo(self) -> None:
        """Give every swapped module its original class again; nothing else was changed.

        Raises:
            RuntimeError: something else changed the class of a module since, as ``fully_shard`` does.
        """
        for each in self.swapped:
            for module, before, after in each.changes:
                if type(module) not in (before, after):
                    raise RuntimeError(f"{each.name}: its class was changed after it was swapped")
                module.__class__ = before

    def __str__(self) -> str:
        rows = [("module", "kind", "")]
        rows += [(each.name or "(model)", each.kind, "swapped") for each in self.swapped]
        rows += [(each.name or "(model)", each.kind, f"left: {each.why}") for each in self.left]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {what}" for name, kind, what in rows]
        if len(rows) == 1:
            lines = ["no attention module or quantizer that is known here"]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])

    __repr__ = __str__
