"""What :func:`alit_kernels.accelerate` did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Swapped:
    """A module whose class was changed.

    Attributes:
        name: of the module in the model; empty for the model itself.
        kind: what it was recognised as.
        before: the modules whose class was changed, itself or parts of it, with the classes that they had.
    """

    name: str
    kind: str
    before: tuple[tuple[nn.Module, type[nn.Module]], ...]


@dataclass(frozen=True)
class Left:
    """A module that looks like one that could be swapped, and why it was not touched."""

    name: str
    kind: str
    why: str


@dataclass(frozen=True)
class Report:
    """Which modules were swapped, which were left and why; printed, it is a table.

    Attributes:
        swapped: of what the class was changed.
        left: what was not touched.
        notes: where a swapped module is not what computes.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...] = ()

    def undo(self) -> None:
        """Give every swapped module the class that it had; nothing else was changed."""
        for each in self.swapped:
            for module, before in each.before:
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
