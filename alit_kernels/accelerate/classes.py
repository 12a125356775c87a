"""Classes of swapped quantizers: subclasses of the original ones, with another forward, that pickle and copy."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from .families import FAMILIES
from .family import Family
from .report import Change


class InOurWay:
    """Base of the classes of swapped quantizers; their pickles and copies find the class again."""

    #: Original class, name of the family, path of the part.
    _swapped: tuple[type[nn.Module], str, str]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new, self._swapped, *reduced[2:])


def _new(base: Any, family: str, part: str) -> Any:
    cls = swapped_class(base, family, part)
    return cls.__new__(cls)


@functools.cache
def swapped_class(base: Any, family: str, part: str) -> Any:
    """Subclass of ``base``, by the same name, whose forward is that of a family's part."""
    function, original = FAMILIES[family].parts[part], base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, original, *args, **kwargs)

    members = {
        "forward": functools.wraps(original)(forward),
        "_swapped": (base, family, part),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return types.new_class(base.__name__, (InOurWay, base), {}, lambda body: body.update(members))


def swap(module: nn.Module, family: Family) -> tuple[Change, ...]:
    """Change the class of each part, unless it is swapped already (modules may share one); return the changes."""
    changes = []
    for part in family.parts:
        target = module.get_submodule(part)
        if not isinstance(target, InOurWay):
            before: Any = type(target)
            target.__class__ = swapped_class(before, family.name, part)
            changes.append(Change(target, before, type(target)))
    return tuple(changes)


def restore(module: nn.Module, family: Family) -> None:
    """Give each swapped part its original class again."""
    for part in family.parts:
        target: Any = module.get_submodule(part)
        if hasattr(target, "_swapped"):
            target.__class__ = target._swapped[0]
